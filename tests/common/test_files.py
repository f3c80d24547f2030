"""Files have their names only once they are complete; what killed processes leave is removed; locks."""

import errno
import json
import os
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.faults.filesystem import Operations
from common import files
from common.files import ROOT, atomic_file, atomic_folder, hash_file, lock, sweep, temporary_name
from trainer.run import resume

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, limits and process numbers as in POSIX")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    for failure in (ValueError, KeyboardInterrupt):
        with pytest.raises(failure), atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise failure
        with pytest.raises(failure), atomic_folder(tmp_path / "b") as folder:
            (folder / "inside").write_text("half")
            raise failure
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_folder_never_replaces_one(tmp_path):
    for content in ("first", "second"):
        try:
            with atomic_folder(tmp_path / "a") as folder:
                (folder / "x").write_text(content)
        except OSError as error:
            assert content == "second" and error.filename
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "x").read_text() == "first"


@posix
def test_all_of_a_folder_is_on_the_disk_before_its_name(tmp_path):
    with Operations(tmp_path) as log, atomic_folder(tmp_path / "new" / "a") as folder:
        os.mkdir(folder / "below")
        for path in (folder / "x", folder / "below" / "y"):
            with open(path, "wb") as file:
                file.write(b"-")
    kinds = [operation.kind for operation in log.done]
    rename = kinds.index("rename")
    flushed = {operation.path for operation in log.done[:rename] if operation.kind == "fsync"}
    made = {operation.path for operation in log.done[:rename] if operation.kind in ("create", "mkdir")}
    assert made - {str(tmp_path / "new")} <= flushed, "every file and folder in it, and itself"
    assert str(tmp_path) in flushed, "the new parent is entered in the folder above"
    assert [operation.path for operation in log.done[rename + 1 :]] == [str(tmp_path / "new")]


def on_a_full_disk(work: str, path: Path) -> str:
    """What a process says that does `work` with `path`, and may write 64 KB to a file."""
    script = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from common.console import run
import numpy as np
from dataset.tokens.cache import get_or_build
from trainer.run.resume import save_state
path = Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
run(lambda: {work})
"""
    done = subprocess.run([sys.executable, "-c", script, str(ROOT), str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    return done.stderr


@posix
def test_a_full_disk_is_an_error_of_the_system_also_in_safetensors_writer(tmp_path):
    """It was a SafetensorError and ended in a traceback; of what was written so far, nothing stays."""
    said = on_a_full_disk('save_state(path, 1, {"weights": {"w": torch.zeros(1 << 18)}}, {}, 2)', tmp_path)
    assert said == f"error: {tmp_path / 'step_00000001'}: {os.strerror(errno.EFBIG)}\n"
    assert names(tmp_path) == []


@posix
def test_a_full_disk_is_an_error_of_the_system_also_in_numpys_writer(tmp_path):
    """It was "262144 requested and 8192 written", in a traceback."""
    work = 'get_or_build(path, "entry", lambda folder: np.save(folder / "values.npy", np.zeros(1 << 17)))'
    said = on_a_full_disk(work, tmp_path / "cache")
    assert said.startswith(f"error: {tmp_path / 'cache' / 'entry'}: the disk is full; ")
    assert names(tmp_path) == []


@posix
def test_the_umask_decides_who_may_read(tmp_path):
    """safetensors makes files that only their owner can read: nobody else could continue or use them."""
    before = os.umask(0o022)
    try:
        state = resume.save_state(tmp_path / "run", 1, {"weights": {"w": torch.zeros(2)}}, {}, 2)
        with atomic_file(tmp_path / "model.safetensors") as temporary:
            save_file({"w": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (*state.iterdir(), tmp_path / "model.safetensors")}
    assert set(modes.values()) == {0o644}, modes


@posix
def test_writing_removes_what_killed_processes_left_of_the_same_name_only(tmp_path):
    """`x` and `x.json` are written at the same time by this process, whose number counts as that of a killed one."""
    host, dead = socket.gethostname(), dead_process()
    left = tmp_path / f".x.{host}-{dead}.tmp"
    left.touch()
    (tmp_path / f".y.{host}-{dead}.tmp").touch()
    with atomic_file(tmp_path / "x.json") as outer:
        with atomic_file(tmp_path / "x"):
            assert outer.exists() and not left.exists()
    assert names(tmp_path) == [f".y.{host}-{dead}.tmp", "x", "x.json"]
    assert len(sweep(tmp_path)) == 1 and names(tmp_path) == ["x", "x.json"]


@posix
@pytest.mark.parametrize("host", ["dgxvm", "gpu.vm", "vm.gpu", "x-vm", "vm-x"])
def test_a_machine_whose_name_is_part_of_anothers_leaves_its_files_alone(host, tmp_path, monkeypatch):
    """`.a.gpu.vm-5.tmp` could be `a` of gpu.vm, or `a.gpu` of vm."""
    number = dead_process()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "getpid", lambda: number)
        patch.setattr(files.socket, "gethostname", lambda: host)
        theirs = temporary_name(tmp_path / "a")
        patch.setattr(files.socket, "gethostname", lambda: "vm")
        ours = temporary_name(tmp_path / "a")
    theirs.touch()
    ours.touch()
    monkeypatch.setattr(files.socket, "gethostname", lambda: "vm")
    assert sweep(tmp_path, "a.gpu") == [] and sweep(tmp_path) == [ours] and theirs.exists()
    monkeypatch.setattr(files.socket, "gethostname", lambda: host)
    assert sweep(tmp_path, "a") == [theirs]


@posix
def test_only_what_is_old_is_removed_for_other_machines(tmp_path):
    new, old = (tmp_path / f".x.another-{number}.tmp" for number in (1, 2))
    for path in (new, old):
        path.touch()
    os.utime(old, (1, 1))
    assert sweep(tmp_path, "x") == [old] and names(tmp_path) == [new.name]


def test_the_block_runs_without_a_lock_where_there_are_none(tmp_path, monkeypatch, capfd):
    """Some network drives answer flock with ENOLCK, Lustre with ENOSYS."""
    import filelock

    def refuse(self, timeout=None):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    ran = []
    with lock(tmp_path / "a.lock", "waiting"):
        ran.append(1)
    assert ran and capfd.readouterr().err == ""


def test_a_lock_is_freed_when_its_holder_is_killed(tmp_path, capfd):
    script = """
import sys, time
sys.path.insert(0, sys.argv[1])
from common.files import lock
with lock(sys.argv[2], ""):
    print("held", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path / "a.lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    command[2] = "import sys; sys.path.insert(0, sys.argv[1]); from common.files import lock\n"
    command[2] += "with lock(sys.argv[2], 'waiting for the other one'): print('mine')"
    waiter = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiter.stderr.readline() == "waiting for the other one\n"
    holder.kill()
    holder.wait()
    assert waiter.communicate(timeout=60)[0] == "mine\n"


def test_a_hash_by_another_program(tmp_path):
    """printf 'sparrow' | sha256sum"""
    (tmp_path / "a").write_bytes(b"sparrow")
    assert hash_file(tmp_path / "a") == "0454d527a7fa92d74a43d6470a274c87b0383fce739c0d1ac17c973c57f1c60c"


def test_a_state_of_the_former_writer_is_whole_and_reads_the_same(tmp_path):
    """It wrote the same layout itself: 8 bytes of the header's length, a JSON header, the numbers."""
    state, numbers = tmp_path / "step_00000003", np.arange(6, dtype=np.float32)
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "seen": {"dtype": "BOOL", "shape": [1], "data_offsets": [24, 25]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    state.mkdir()
    content = struct.pack("<Q", len(text)) + text + numbers.tobytes() + b"\1"
    (state / "weights.safetensors").write_bytes(content)
    (state / "state.json").write_bytes(b'{\n "step": 3\n}')
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(state.iterdir())
    }
    (state / "manifest.json").write_text(json.dumps(manifest))
    assert resume.newest_state(tmp_path) == state
    tensors, values = resume.read_state(state)
    assert tensors["weights"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["weights"]["seen"].tolist() == [True]
    assert values == {"step": 3}
    again = resume.save_state(tmp_path, 3, tensors, values, 2)
    assert names(again) == ["manifest.json", "state.json", "weights.safetensors"]
    assert json.loads((again / "manifest.json").read_text()).keys() == manifest.keys()


def test_a_folder_that_has_the_name_is_named_and_not_the_temporary_file(tmp_path):
    """`--json FOLDER` ended with `.FOLDER.host-123.tmp: is a directory`."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as raised, atomic_file(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert raised.value.filename == str(tmp_path / "folder") and os.listdir(tmp_path) == ["folder"]


def test_a_copy_that_fails_names_where_to(tmp_path):
    """shutil.copyfile names both files: it is the target's disk that is full."""
    target = tmp_path / "tokenizer.json"
    with pytest.raises(OSError, match="tokenizer.json") as caught, atomic_file(target) as temporary:
        raise OSError(errno.ENOSPC, "full", "/elsewhere/source.json", None, str(temporary))
    assert caught.value.filename == str(target) and "elsewhere" not in str(caught.value)
