"""lm-evaluation-harness's `local-completions` on the server gives the numbers of scripts/lm_eval_sparrow.py."""

import pytest

from model.checkpoint import save_weights
from tests.helpers.harness import check_same_numbers, evaluate, write_tasks
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.servers import running, served


def test_the_numbers_of_our_own_adapter(tmp_path, monkeypatch):
    """As it is called in docs/serving.md: two requests at a time, each with four prompts."""
    for package in ("lm_eval", "datasets", "transformers", "tenacity", "aiohttp"):
        pytest.importorskip(package)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from evaluation.harness import register

    model = small_model(std=0.2, num_attention_heads=4, num_key_value_heads=2).eval()
    known = dict(path="tokenizer", hash=TOKENIZER.hash)
    weights = save_weights(tmp_path / "full_sft_32.pth", model, tokenizer=known, lineage=[])
    tasks = write_tasks(tmp_path)
    ours = evaluate(register()(weight=str(weights), dtype="float32", device="cpu"), tasks)
    with running(served(model)) as server:
        theirs = LocalCompletionsAPI(
            base_url=server.url + "/v1/completions",
            model="tiny",
            tokenizer=str(TOKENIZER.path),
            tokenizer_backend="huggingface",
            custom_prefix_token_id=TOKENIZER.end_of_text,
            batch_size=4,
            num_concurrent=2,
        )
        check_same_numbers(evaluate(theirs, tasks), ours)
