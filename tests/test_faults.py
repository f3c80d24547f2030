"""The fault benchmarks (benchmarks/faults/), a few cases of each here, all of them in `make soak`."""

import os
import subprocess
import sys

import pytest

from benchmarks.faults import bad_steps, damage, operations, stops
from common import files
from common.files import ROOT
from trainer.run.logger import RunLogger

posix = pytest.mark.skipif(os.name != "posix", reason="forks")


def script(name: str, *flags: str) -> subprocess.CompletedProcess:
    """In a process of its own: some fork, which a process with threads should not."""
    command = [sys.executable, str(ROOT / "benchmarks" / "faults" / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize("stage", stops.STAGES)
def test_a_stopped_run_ends_like_an_undisturbed_one(stage, tmp_path, monkeypatch):
    """Also what it logs: a run stopped between two logs averaged the second half of that window only."""
    monkeypatch.setattr(RunLogger, "draw", lambda self: None)
    assert stops.trials(stage, 4, [2, 5, 8], tmp_path) == [True] * 3


def test_two_equal_runs_and_two_different_ones(tmp_path):
    """What `stops` compares can differ."""
    data = stops.write_pretrain(tmp_path / "a.jsonl")
    flags = [f"--data_path={data}", f"--max_steps={stops.STEPS}", "--batch_size=2"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        stops.train("pretrain", tmp_path / name, [*flags, f"--seed={seed}"], None)
    a, b, c = (stops.result(tmp_path / name) for name in "abc")
    assert stops.same(a, b) and not stops.same(a, c)


def test_damage_to_the_newest_state(capsys):
    assert damage.main() == 0
    assert int(capsys.readouterr().out.split(":")[1].split()[0]) >= 200


def test_power_cuts(tmp_path):
    operations.prepare(tmp_path / "base")
    tried, faults = operations.power_cuts(tmp_path / "base", tmp_path / "root", 3, every=4)
    assert tried > 100 and not faults


def test_the_simulated_disk_sees_a_missing_fsync(tmp_path, monkeypatch):
    """Without it, the name of a state can be there before its bytes are."""
    operations.prepare(tmp_path / "base")

    class Careless:
        fsync = staticmethod(lambda descriptor: None)

        def __getattr__(self, name):
            return getattr(os, name)

    monkeypatch.setattr(files, "os", Careless())
    assert operations.power_cuts(tmp_path / "base", tmp_path / "root", 4, every=8)[1]


@posix
def test_exits_at_operations_of_a_save():
    """Every eleventh here."""
    done = script("operations", "--every", "11")
    assert done.stdout.count(" 0 times the state before was not whole") == 6


@posix
def test_kill_9():
    assert "20 trials" in script("kill", "--trials", "20").stdout


def test_bad_rows_on_one_process_of_two(tmp_path):
    assert bad_steps.two_processes(tmp_path, 1, 4).returncode == 0


@pytest.mark.soak
@pytest.mark.parametrize("name", ["stops", "operations", "kill", "bad_steps", "ranks", "memory"])
def test_everything(name):
    print(script(name).stdout)


def test_malicious_files():
    done = script("malicious")
    assert "0 executed" in done.stdout
