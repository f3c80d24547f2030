"""States on the disk: what is written is what is read, the newest whole one counts, no older one goes too soon."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from common import manifest
from common.files import ROOT, atomic_file, sweep, temporary_name
from common.manifest import problem
from tests.helpers.rows import write_pretrain
from tests.helpers.runs import run_stage
from trainer.run import resume
from trainer.run.resume import write_state


def save(folder, step, keep_last=2, value=None):
    tensors = {"weights": {"w": torch.full((3, 5), float(step if value is None else value))}}
    return resume.save_state(folder, step, tensors, {"step": step}, keep_last)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_kind_of_tensor_comes_back(tmp_path):
    """Our writer, safetensors' reader: a scalar, an empty one, odd sizes before wide ones, a transposed one."""
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "half": torch.randn(3).half(),
        "yes": torch.tensor([True]),
        "brain": torch.randn(5).bfloat16(),
        "long": torch.tensor([2**40]),
        "名": torch.ones(2),
    }
    write_state(tmp_path / "a", {"x": tensors}, {"名": "字"})
    found = load_file(tmp_path / "a" / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert resume.read_values(tmp_path / "a") == {"名": "字"} and problem(tmp_path / "a") is None
    assert names(tmp_path) == ["a"]


def test_the_same_step_again_overwrites_nothing(tmp_path):
    """`rmtree(old); rename(new)` lost both when it was killed in between."""
    save(tmp_path, 5, value=1)
    again = save(tmp_path, 5, value=2)
    assert names(tmp_path) == ["step_00000005", "step_00000005.1"] and resume.newest_state(tmp_path) == again
    third = save(tmp_path, 5, value=3)
    assert names(tmp_path) == ["step_00000005.1", "step_00000005.2"]
    assert resume.read_state(third)[0]["weights"]["w"][0, 0] == 3


def test_rotation_counts_by_number(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):  # the last two sort before the first as text
        save(tmp_path, step)
    assert names(tmp_path) == ["step_100000000", "step_100000001"]


def test_a_broken_state_is_set_aside_and_not_counted(tmp_path):
    """Otherwise keep_last 2 would keep the broken one and drop the one that was just resumed from."""
    for step in (2, 4):
        save(tmp_path, step)
    (tmp_path / "step_00000004" / "weights.safetensors").unlink()
    said = []
    assert resume.newest_state(tmp_path, said.append).name == "step_00000002"
    assert "step_00000004: weights.safetensors is missing; trying the one before" in said[0]
    save(tmp_path, 4)
    assert names(tmp_path) == ["broken-step_00000004", "step_00000002", "step_00000004"]


@pytest.mark.parametrize("manifest", ["{}", "[]", "", '{"../x": {}, "state.json": {}}', '{"state.json": null}', "\xff"])
def test_a_manifest_that_confirms_nothing(manifest, tmp_path):
    state = save(tmp_path, 1)
    (state / "manifest.json").write_text(manifest, encoding="latin-1")
    assert problem(state)


def test_infinite_numbers_are_not_saved():
    tensors = {"weights": {"a": torch.ones(2)}, "optimizer": {"a/exp_avg": torch.tensor([1, torch.inf])}}
    with pytest.raises(ValueError, match="optimizer a/exp_avg is no longer finite, so nothing was saved"):
        resume.refuse_infinite(tensors)


@pytest.mark.skipif(os.name != "posix", reason="asks whether a process lives")
def test_litter_of_killed_processes_is_swept_and_of_living_ones_is_not(tmp_path):
    script = """
import sys, time, pathlib
sys.path.insert(0, sys.argv[1])
from common.files import temporary_name
folder = pathlib.Path(sys.argv[2])
temporary_name(folder / "a.pth").write_bytes(b"half")
(temporary_name(folder / "step_00000001") / "inside").mkdir(parents=True)
print("ready", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    (tmp_path / ".hidden").touch()
    assert sweep(tmp_path) == [] and len(names(tmp_path)) == 3
    process.kill()
    process.wait()
    assert len(sweep(tmp_path)) == 2 and names(tmp_path) == [".hidden"]
    with atomic_file(tmp_path / "b") as temporary:  # a former life with our number, in a container
        temporary.touch()
        assert temporary == temporary_name(tmp_path / "b") and sweep(tmp_path) == [temporary]
        temporary.touch()


def test_going_on_from_an_older_state_becomes_a_run_of_its_own(tmp_path, capsys):
    """Rotation kept steps 4 and 6 of the branch that was left, and deleted step 3 of the new one right after writing
    it."""
    write_pretrain(tmp_path / "data.jsonl")
    flags = [f"--data_path={tmp_path / 'data.jsonl'}", "--batch_size=4", f"--save_dir={tmp_path}", "--save_interval=2"]
    flags += ["--keep_last=2"]
    run_stage("pretrain", *flags, "--max_steps=6")
    (older,) = tmp_path.glob("resume/*/*/step_00000004")
    run_stage("pretrain", *flags, "--max_steps=6", f"--from_resume={older}", "--learning_rate=1e-3")
    runs = sorted(tmp_path.glob("resume/*/*"))
    assert [names(run) for run in runs] == [["step_00000004", "step_00000006"], ["step_00000006"]]
    said = capsys.readouterr().out
    assert "a continued run keeps its stage, architecture, data" in said and "learning_rate 0.01 -> 0.001" in said
    run_stage("pretrain", *flags, "--max_steps=8", "--from_resume=auto", "--learning_rate=1e-3")
    assert names(runs[1]) == ["step_00000006", "step_00000008"]  # the newest run goes on


def test_states_of_other_runs_are_neither_read_as_a_whole_nor_renamed(tmp_path, monkeypatch):
    """Every start hashed the newest state of every run in the folder, 20 GB each, and renamed the broken ones of runs
    that were not its own."""
    tensors = {"weights": {"w": torch.ones(2)}}
    for run, data, steps in (("1-ours", "a", (2, 4)), ("2-theirs", "b", (6,)), ("3-unreadable", "a", (8,))):
        for step in steps:
            write_state(tmp_path / run / f"step_0000000{step}", tensors, {"identity": {"data": data}})
    for broken in ("1-ours/step_00000004", "2-theirs/step_00000006"):
        (tmp_path / broken / "weights.safetensors").write_bytes(b"-")
    (tmp_path / "3-unreadable" / "step_00000008" / "manifest.json").unlink()
    hashed, said, hash_file = [], [], manifest.hash_file

    def counted(path):
        hashed.append(path.relative_to(tmp_path).as_posix())
        return hash_file(path)

    monkeypatch.setattr(manifest, "hash_file", counted)
    find = lambda wanted, data: resume.find_state(tmp_path, str(wanted), {"data": data}, said.append)
    assert find("auto", "a") == tmp_path / "1-ours" / "step_00000002"
    assert [path for path in hashed if not path.startswith("1-ours")] == ["2-theirs/step_00000006/state.json"]
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*"))
    assert left == [
        "1-ours/broken-step_00000004",
        "1-ours/step_00000002",
        "2-theirs/step_00000006",
        "3-unreadable/step_00000008",
    ]
    assert "step_00000008: manifest.json is missing; left as it is" in said[0]
    assert "step_00000004: weights.safetensors is not what was written; trying the one before" in said[1]
    for wanted in ("auto", tmp_path / "1-ours", tmp_path / "1-ours" / "step_00000002"):
        hashed.clear()
        with pytest.raises(ValueError, match='step_00000002: data was "a", is "c"'):
            find(wanted, "c")
        assert not any("weights" in path for path in hashed)


def test_of_two_launches_in_one_run_the_state_that_is_taken_counts(tmp_path, monkeypatch):
    """The newest state is of this launch and broken; the one before, of an earlier launch, must not be taken for it."""
    run = tmp_path / "run"
    write_state(run / "step_00000003", {}, {"identity": {}, "launch": "another"})
    write_state(run / "step_00000006", {"weights": {"w": torch.ones(2)}}, {"identity": {}, "launch": resume.launch()})
    (run / "step_00000006" / "weights.safetensors").unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resume.find_state(tmp_path, "0", {}, [].append) is None


def test_a_restarted_process_continues_this_launch_only(tmp_path, monkeypatch):
    """An older, finished run of the same model and data lies there: a launch that died before its first save must not
    take that for its own, else it would be done at once."""
    identity = {"data": "1f"}
    values = lambda launch: {"identity": identity, "launch": launch}
    write_state(tmp_path / "old" / "step_00000009", {}, values("another"))
    find = lambda wanted="0": resume.find_state(tmp_path, wanted, identity, [].append)
    assert find() is None and find("auto")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find() is None
    write_state(tmp_path / "own" / "step_00000003", {}, values(resume.launch()))
    write_state(tmp_path / "own-later" / "step_00000001", {}, values("a third"))
    assert find().parent.name == find(str(tmp_path / "old")).parent.name == "own"
