"""lm-evaluation-harness on our weights gives the numbers of its own adapter for transformers on the exported ones."""

import subprocess
import sys

import pytest
import torch

from common.files import ROOT
from model.checkpoint import load_weights, save_weights
from model.export import save_hf
from tests.helpers.harness import check_same_numbers, evaluate, write_tasks
from tests.helpers.models import TOKENIZER, small_model


@pytest.fixture(scope="module")
def lm_eval():
    pytest.importorskip("datasets")
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    model = small_model(std=0.2, num_attention_heads=4, num_key_value_heads=2)
    known = dict(path="tokenizer", hash=TOKENIZER.hash)
    return save_weights(folder / "full_sft_32.pth", model, tokenizer=known, lineage=[])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_the_numbers_of_transformers_own_adapter(lm_eval, weights, tasks, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM

    from evaluation.harness import register

    checkpoint = load_weights(weights)
    save_hf(tmp_path / "hf", checkpoint, TOKENIZER.path, TOKENIZER.stop_ids)
    ours = evaluate(register()(weight=str(weights), dtype="float32", device="cpu"), tasks)
    # its default prefix would be <|im_end|>, the exported tokenizer's eos; our documents begin with <|endoftext|>
    prefix = TOKENIZER.end_of_text
    options = dict(dtype="float32", device="cpu", batch_size=4, prefix_token_id=prefix)
    theirs = evaluate(HFLM(pretrained=str(tmp_path / "hf"), **options), tasks)
    check_same_numbers(ours, theirs)


def test_greedy_is_known_for_each_continuation(lm_eval, weights):
    """The harness asks of each continuation whether the model would say it."""
    from evaluation.harness import register
    from inference.answers import answers_to_ids

    lm = register()(weight=str(weights), dtype="float32", device="cpu")
    prompt = TOKENIZER.encode("once upon a time")
    (said,) = answers_to_ids(lm.model, TOKENIZER, [prompt], max_new_tokens=5)
    other = [*said.ids[:4], (said.ids[4] + 1) % 6000]
    found = lm._loglikelihood_tokens([(None, prompt, said.ids), (None, prompt, other)])
    assert [greedy for _, greedy in found] == [True, False]
    with torch.no_grad():
        logp = lm.model(torch.tensor([prompt + other])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = logp.gather(1, torch.tensor(other)[:, None]).sum()
    assert found[1][0] == pytest.approx(float(expected), rel=1e-4)


def test_a_chat_template_goes_through_the_harness_as_text(lm_eval, weights):
    from evaluation.harness import register
    from tokenizer.chat import encode_chat

    lm = register()(weight=str(weights), dtype="float32", device="cpu")
    messages = [{"role": "user", "content": "你好 there"}]
    ids = encode_chat(TOKENIZER, messages, add_generation_prompt=True).ids
    assert lm.tok_encode("<|im_end|>") == TOKENIZER.encode("<|im_end|>")  # text, as long as there is no template
    assert lm.tok_encode(lm.apply_chat_template(messages)) == ids


def test_without_the_harness_it_says_what_to_install(tmp_path):
    """In a process of its own, in which the package cannot be imported."""
    block = "import sys, runpy; sys.modules['lm_eval'] = None; sys.argv = ['s', '--tasks', 'arc_easy'];"
    script = ROOT / "scripts/lm_eval_sparrow.py"
    done = subprocess.run(
        [sys.executable, "-c", f"{block} runpy.run_path({str(script)!r}, run_name='__main__')"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and "pip install lm-eval" in done.stderr and done.stderr.count("\n") == 1
