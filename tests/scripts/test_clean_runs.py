"""Removing checkpoints: only what was asked for, never the weights, and nothing before --remove."""

import json
import os
import time

import pytest

from common.manifest import write_manifest
from tests.helpers.runs import run_script


def state(folder, run: str, step: int, total: int = 100, days: float = 0.0):
    path = folder / "resume" / "pretrain_192" / run / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(b"x" * 1_000_000)
    (path / "state.json").write_text(json.dumps(dict(step=step, total=total)))
    write_manifest(path, ["weights.safetensors", "state.json"])
    then = time.time() - days * 86400
    os.utime(path, (then, then))


@pytest.fixture
def out(tmp_path):
    """A run that goes on with three checkpoints, a finished one with two, and one that nobody has touched for long."""
    for step in (10, 20, 30):
        state(tmp_path, "1-goes-on", step)
    for step in (90, 100):
        state(tmp_path, "2-finished", step)
    state(tmp_path, "3-old", 5, days=40)
    (tmp_path / "pretrain_192.pth").write_bytes(b"weights")
    return tmp_path


def left(out) -> dict[str, list[int]]:
    runs = sorted((out / "resume" / "pretrain_192").iterdir())
    return {run.name[0]: sorted(int(path.name[5:]) for path in run.iterdir()) for run in runs}


def clean(out, *flags) -> str:
    status, said, error = run_script("scripts/clean_runs.py", f"--save_dir={out}", *flags)
    assert status == 0, error
    assert (out / "pretrain_192.pth").read_bytes() == b"weights"
    return said


def test_listing_removes_nothing(out):
    said = clean(out)
    assert "1-goes-on: step 30 of 100" in said and "3-old: step 5 of 100, 40 days ago" in said
    assert said.count("not needed\n") == 3 and "of 6.0 MB in checkpoints, 3.0 MB are not needed; --remove" in said
    assert left(out) == {"1": [10, 20, 30], "2": [90, 100], "3": [5]}


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], {"1": [30], "2": [100], "3": [5]}),
        (["--keep_last=2"], {"1": [20, 30], "2": [90, 100], "3": [5]}),
        (["--finished"], {"1": [30], "2": [], "3": [5]}),
        (["--older_than=30"], {"1": [30], "2": [100], "3": []}),
    ],
)
def test_what_is_removed(out, flags, expected):
    assert "and are removed" in clean(out, *flags, "--remove")
    assert left(out) == expected


def test_a_damaged_checkpoint_is_never_taken_for_a_finished_run(out):
    (out / "resume" / "pretrain_192" / "2-finished" / "step_00000100" / "state.json").write_text("{")
    assert "2-finished: step 100 of ?" in clean(out, "--finished", "--remove")
    assert left(out)["2"] == [90, 100]


def test_a_place_without_runs(tmp_path):
    assert "of 0.0 MB in checkpoints" in clean_empty(tmp_path)
    status, _, error = run_script("scripts/clean_runs.py", f"--save_dir={tmp_path / 'none'}")
    assert status == 2 and "there is no such folder" in error


def clean_empty(folder) -> str:
    status, said, _ = run_script("scripts/clean_runs.py", f"--save_dir={folder}")
    assert status == 0
    return said


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(out):
    """A run continues from the newest whole one. The script used to keep the newest, whole or not, and remove that."""
    newest = out / "resume" / "pretrain_192" / "1-goes-on" / "step_00000030"
    (newest / "weights.safetensors").write_bytes(b"x" * 100)
    clean(out, "--remove")
    assert left(out)["1"] == [20, 30]
    for step in (10, 20, 30):
        state(out, "4-broken", step)
        (out / "resume" / "pretrain_192" / "4-broken" / f"step_{step:08d}" / "weights.safetensors").write_bytes(b"")
    clean(out, "--remove")
    assert left(out)["4"] == [10, 20, 30]
