"""The benchmark for cards runs where there is none, and one part that fails does not take the others with it."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks.gpu import run
from benchmarks.gpu.bench import Bench
from common.files import ROOT

RUN = ROOT / "benchmarks" / "gpu" / "run.py"


def bench(out, *flags) -> tuple[int, dict]:
    command = [sys.executable, str(RUN), "--device=cpu", "--tiny", *flags]
    done = subprocess.run(command, env={**os.environ, "OUT": str(out)}, capture_output=True, text=True)
    assert (out / "report.md").is_file(), done.stdout + done.stderr
    return done.returncode, json.loads((out / "results.json").read_text(encoding="utf-8"))["parts"]


@pytest.mark.soak
def test_every_part_runs(tmp_path):
    status, parts = bench(tmp_path)
    assert status == 0 and parts["tests"] == {"skipped": "no card"}
    assert not [name for name, result in parts.items() if "error" in result]
    assert parts["small"]["times as fast"]["median"] > 0 and parts["memory"]["planned / real"] > 0


@pytest.mark.soak
def test_a_part_that_takes_too_long_does_not_take_the_others_with_it(tmp_path):
    """Its process is ended, it is named, and the next part gets a new process."""
    status, parts = bench(tmp_path, "--parts=small,moe,facts", "--part_limit=0.05")
    assert status == 1 and set(parts) == {"facts", "small", "moe"}
    assert all("took too long" in parts[name]["error"] for name in ("small", "moe"))


def test_the_device_has_a_number(monkeypatch, tmp_path):
    """The loader's thread sets its device, which torch refuses to do for `cuda` without one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])  # a build for CUDA would ask the missing card
    assert Bench("cuda", True, True, str(tmp_path)).device == torch.device("cuda", 0)


TESTS = """
import time
import pytest

pytestmark = pytest.mark.gpu


def test_fine(): pass
def test_wrong(): assert 1 == 2
def test_slow(): time.sleep(60)
"""


def test_tests_that_take_too_long_still_say_what_has_failed(tmp_path, monkeypatch):
    """The tests are ended as by Ctrl-C. One that is well says how many have passed."""
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_three.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -q")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "OUT", tmp_path)
    found = run.run_tests(Namespace(device="cuda"), "test_three", 15)
    assert "more than 15 s" in found["error"] and len(found["failed"]) == 1 and "test_wrong" in found["failed"][0]
    assert "assert 1 == 2" in (tmp_path / "tests.txt").read_text()
    assert run.run_tests(Namespace(device="cuda"), "fine", 60)["passed"].startswith("1 passed, 2 deselected")
