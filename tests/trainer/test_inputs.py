"""What a stage opens before it starts, and what it says about it."""

from common.options import parse
from dataset.tokens.examples import SFTDataset
from tests.helpers.models import TOKENIZER
from tests.helpers.rows import chat, jsonl
from trainer.inputs import open_data
from trainer.train_full_sft import SFTConfig


def warnings(folder, short: int, long: int) -> list[str]:
    rows = [chat(f"{i}", "hello") for i in range(short)] + [chat(f"{i}", "hello " * 60) for i in range(long)]
    data, out = jsonl(folder / f"{short}.jsonl", *rows), folder / "out"
    words = [f"--data_path={data}", f"--save_dir={out}", "--max_seq_len=32", "--on_long=drop", "--num_workers=1"]
    found = open_data(SFTDataset, parse(SFTConfig, words), "sft", TOKENIZER, on_long="drop")
    return [line for line in found.notes if line.startswith("warning: ")]


def test_many_rows_lost_to_the_length_get_a_warning_of_their_own(tmp_path):
    """138 of 300 were left out, and only the middle of a long line said so."""
    (line,) = warnings(tmp_path, short=6, long=4)
    assert line.startswith(
        "warning: 4 of 10 rows (40%) are left out, too long for --max_seq_len 32; the longest needs "
    )
    assert warnings(tmp_path, short=19, long=1) == [], "a few are usual"
