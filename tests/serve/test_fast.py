"""--quantize and --prompt_lookup_num_tokens of the server."""

import pytest

from inference.engine import Request
from inference.sampling import Sampling
from model.checkpoint import save_weights
from model.quant_cpu import Int8Linear
from serve.models import load_table
from tests.helpers.models import TOKENIZER, small_model


@pytest.fixture
def folder(tmp_path):
    known = dict(path="tokenizer", hash=TOKENIZER.hash)
    save_weights(tmp_path / "full_sft_32.pth", small_model(), tokenizer=known, lineage=[dict(stage="full_sft")])
    return tmp_path


def test_models_are_packed_and_say_so(folder):
    table, remarks = load_table(
        ["full_sft"], [], (folder,), rows=2, max_seq_len=64, device="cpu", quantize="int8", prompt_lookup_num_tokens=3
    )
    engine = table["full_sft"].engine
    assert isinstance(engine.model.lm_head, Int8Linear)
    assert any("full_sft_32.pth: --quantize int8: 0.2M weights" in remark for remark in remarks)
    sequence = engine.submit(Request([5, 6, 7] * 3, Sampling(temperature=0), 8))
    while engine.busy:
        engine.step()
    assert len(sequence.tokens) == 8 and sequence.lookup is not None
