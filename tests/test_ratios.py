"""What was gained stays gained: ratios of two sides that are measured in turns on the same machine, with wide margins.

The figures themselves are in docs/benchmarks.md. A machine that is busy with other work changes both sides alike.
"""

import json
import subprocess
import sys

import pytest

from common.files import ROOT
from tests.helpers.rows import write_sft
from trainer.loop.compiling import can_compile

pytestmark = pytest.mark.soak


def measured(folder, script: str, *flags: object) -> dict[tuple[str, str], float]:
    """Runs a benchmark -> {(name, unit): median}."""
    command = [sys.executable, ROOT / f"benchmarks/{script}.py", *map(str, flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((folder / f"out/benchmarks/{script}.json").read_text(encoding="utf-8"))
    return {(row["name"], row["unit"]): row["median"] for row in content["rows"]}


def test_packed_rows_train_more_tokens_than_padded_ones(tmp_path):
    """Chats of a few words in rows of 256: measured 16 times as many with `small`."""
    write_sft(tmp_path / "sft.jsonl", 400)
    flags = ["--data_path", tmp_path / "sft.jsonl", "--preset=nano", "--length=256", "--rounds=3", "--compile=off"]
    assert measured(tmp_path, "sft", *flags)["ours against theirs", "times as fast"] > 2


@pytest.mark.skipif(not can_compile("cpu"), reason="needs a C++ compiler")
def test_compiled_code_is_not_slower(tmp_path):
    """Each against the same loop around transformers, which is never compiled."""
    pytest.importorskip("transformers")
    flags = ["--preset=small", "--rows=2", "--length=256", "--rounds=3", "--steps=2"]
    eager, compiled = (
        measured(tmp_path, "train_step", *flags, f"--compile={mode}")["ours against theirs", "times as fast"]
        for mode in ("off", "on")
    )
    assert compiled > 0.95 * eager and compiled > 0.8


def test_a_large_vocabulary_in_chunks_takes_less_memory(tmp_path):
    """Measured 0.86 at this size, and less at larger ones."""
    found = measured(tmp_path, "head_memory", "--rows=1", "--length=960")
    assert found["in chunks against all at once", "times as much"] < 0.95


def test_answers_at_once_and_likelihoods_are_fast(tmp_path):
    flags = ["--preset=nano", "--rows=64", "--tokens=16", "--count=128", "--rounds=3", "--compare=4"]
    found = measured(tmp_path, "evaluation", *flags)
    assert found["at once against one by one", "times as fast"] > 5
    assert found["likelihoods against it", "times as fast"] > 0.6


def test_a_table_is_written_with_what_it_depends_on(tmp_path):
    found = measured(tmp_path, "startup", "--rounds=1")
    assert found["import torch", "s"] > found["train_pretrain.py --help", "s"] > 0
    folder = tmp_path / "out/benchmarks"
    known = json.loads((folder / "startup.json").read_text(encoding="utf-8"))["environment"]
    assert known["cores"] >= 1 and known["threads"] >= 1 and known["cpu"] and known["torch"]
    text = (folder / "startup.md").read_text(encoding="utf-8")
    assert f"- torch: {known['torch']}" in text and "| import torch | " in text
    assert (folder / "startup.png").read_bytes().startswith(b"\x89PNG")
