"""What a stage opens before it starts, and what it says about it."""

from pathlib import Path

import pytest

from common.options import parse
from dataset.tokens.examples import PretrainDataset, SFTDataset
from tests.helpers.models import TOKENIZER
from tests.helpers.rows import chat, jsonl
from tests.helpers.runs import run_stage
from trainer import inputs
from trainer.inputs import choose_files, open_data
from trainer.train_full_sft import SFTConfig
from trainer.train_pretrain import PretrainConfig


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


def test_the_first_token_of_a_row_of_pretraining_is_not_shown_as_trained_on(tmp_path):
    """Nothing predicts it. As the last target of the row before, it is trained on there."""
    data, ids = jsonl(tmp_path / "a.jsonl", {"text": "one two three four five"}), TOKENIZER.encode("one two three four")
    words = [f"--data_path={data}", f"--save_dir={tmp_path}", f"--max_seq_len={len(ids)}", "--show_labels=2"]
    shown = open_data(PretrainDataset, parse(PretrainConfig, words), "pretrain", TOKENIZER).notes
    assert shown[-3] == "<|endoftext|>⟦one two three four⟧" and shown[-1] == " four⟦ five<|endoftext|>⟧", shown


def test_a_preset_that_contradicts_the_weights_is_named_as_it_was_typed(tmp_path):
    """`leave it out` was said of --hidden_size 512, which nobody had given."""
    data = jsonl(tmp_path / "a.jsonl", *[{"text": "one two three four"}] * 9)
    run_stage("pretrain", f"--data_path={data}", f"--save_dir={tmp_path}", "--max_steps=1")
    chats = jsonl(tmp_path / "b.jsonl", chat("hi", "yo"))
    with pytest.raises(
        ValueError, match=r"_32.pth: --preset small, which is --hidden_size 512 \(it has 32\), .* contradicts"
    ):
        run_stage("full_sft", f"--data_path={chats}", f"--save_dir={tmp_path}", "--preset=small")


def test_validating_with_what_is_trained_on_gets_a_warning(tmp_path):
    """The loss fell as on new text, and nothing said that it is not new. A copy is the same text."""
    rows = [{"text": f"one two three {i}"} for i in range(9)]
    data, new = jsonl(tmp_path / "a.jsonl", *rows), jsonl(tmp_path / "new.jsonl", *rows[:5])
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(data).read_bytes())

    def warned(*val):
        words = [f"--data_path={data}", f"--save_dir={tmp_path}", "--max_seq_len=8", "--val_path", *map(str, val)]
        notes = open_data(PretrainDataset, parse(PretrainConfig, words), "pretrain", TOKENIZER).notes
        return [note for note in notes if "is trained on too" in note]

    assert warned(new) == []
    for known in (data, copy):
        (line,) = warned(new, known)
        assert line.startswith(f"warning: {known} is trained on too, so val_loss says nothing about new text")


def test_data_larger_than_memory_belongs_on_an_ssd(monkeypatch):
    monkeypatch.setattr(
        inputs.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1_000_000}.__getitem__, raising=False
    )
    assert inputs.random_reads(4_096_000_000) == []
    [note] = inputs.random_reads(8_000_000_000)
    assert "8.0 GB of tokens do not fit into 4.1 GB of memory" in note and "--cache_dir" in note


def test_a_data_set_of_2000_files_is_named_in_a_line(tmp_path):
    names = [str(tmp_path / f"part_{i}.jsonl") for i in range(2000)]
    files, _, note = choose_files(parse(SFTConfig, ["--data_path", *names]), "sft")
    assert files == tuple(names)
    assert note == "data: " + ", ".join(names[:5]) + " and 1,995 more"
