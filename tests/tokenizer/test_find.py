"""Weights and their tokenizer stay together when their folder is moved."""

import pytest

from common.console import UserError
from model.export import copy_tokenizer
from tests.helpers.tokenizers import without_tags
from tokenizer.find import tokenizer_of


@pytest.mark.parametrize("weights", ["x_32.pth", "best/x_32.pth"])
@pytest.mark.parametrize("place", ["final_model", "lora_model", "tokenizer", "."])
def test_a_moved_output_dir_finds_the_tokenizer_in_it(weights, place, tmp_path):
    """`--output_dir` leaves a copy of the tokenizer in final_model/; only the folder above was searched."""
    tokenizer = without_tags(tmp_path / "original", "<answer>", "</answer>")
    recorded = dict(path=str(tmp_path / "gone"), hash=tokenizer.hash)
    moved = tmp_path / "moved"
    copy_tokenizer(moved / place, tmp_path / "original")
    assert tokenizer_of(recorded, moved / weights, 6400).hash == tokenizer.hash
    with pytest.raises(UserError, match="another one"):
        tokenizer_of(recorded, tmp_path / "elsewhere" / weights, 6400)  # only the shipped one is left
