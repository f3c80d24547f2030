"""What Windows does differently, played on any system: there is no Windows here, and nobody has run Sparrow on one."""

import ctypes
import errno
import io
import os
import subprocess
import sys
from concurrent.futures import process
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import files
from common.console import run, takes_colour
from common.files import ROOT, atomic_file, atomic_folder
from dataset.tokens import token_cache
from tests.helpers.rows import write_sft
from tests.helpers.runs import sft_engine
from trainer.loop import processes
from trainer.run import logger


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.fixture
def held_open(monkeypatch):
    """A virus scanner or a server has each file open when it is to be moved, for so many tries -> what was waited."""
    replace, waited, left = os.replace, [], [0]

    def refuse(source, target):
        if left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, "Access is denied", str(source), 5)
        replace(source, target)

    def hold(tries: int) -> list[float]:
        left[0] = tries
        return waited

    monkeypatch.setattr(files.os, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return hold


def test_a_file_that_somebody_holds_open_is_replaced_when_it_is_free(windows, held_open, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    waited = held_open(3)
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and waited == list(files.WAITS[:3])
    held_open(2)
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "inside").write_bytes(b"")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b"]


def test_a_file_that_is_never_free_is_an_error_and_stays(windows, held_open, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    waited = held_open(1000)
    with pytest.raises(PermissionError, match="a'"), atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and waited == list(files.WAITS)


def test_nobody_waits_on_other_systems(held_open, tmp_path):
    waited = held_open(1)
    with pytest.raises(PermissionError), atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
    assert not waited


def test_no_more_processes_than_python_can_wait_for(windows, monkeypatch):
    """A machine with 64 threads could not tokenise a large file: Python allows 61 processes on Windows."""
    asked = []

    class Pool:
        def __init__(self, workers, *_, **__):
            asked.append(process.ProcessPoolExecutor(workers)._max_workers)  # ValueError: there are too many
            raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(token_cache, "cores", lambda: 64)
    with pytest.raises(KeyboardInterrupt):
        next(token_cache.blocks(iter([]), token_cache.PROCESSES_FROM, SimpleNamespace(path=""), None, None))
    assert asked == [61]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are mapped")
def test_a_run_lets_go_of_the_state_that_it_continues_from(tmp_path):
    """Its moments stayed maps of the file until the run ended. Windows would have kept that state on the disk."""
    write_sft(tmp_path / "sft.jsonl")
    sft_engine(tmp_path, 8, 1, max_steps=2).run()
    engine = sft_engine(tmp_path, 8, 1, max_steps=3, from_resume="auto")
    assert engine.step == 2
    assert str(tmp_path / "out" / "resume") not in Path("/proc/self/maps").read_text(encoding="utf-8")


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 1


@pytest.mark.parametrize("is_console, obeys", [(1, 1), (1, 0), (0, 0)])
def test_a_console_is_asked_to_obey_escape_sequences(is_console, obeys, windows, monkeypatch):
    """It printed them: `←[2m...←[0m`."""
    asked = []

    class Kernel:
        @staticmethod
        def GetConsoleMode(handle, mode):
            ctypes.cast(mode, ctypes.POINTER(ctypes.c_uint32))[0] = 3
            return is_console

        @staticmethod
        def SetConsoleMode(handle, mode):
            asked.append((handle.value, mode))
            return obeys

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=Kernel), raising=False)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(get_osfhandle=lambda number: 40 + number))
    assert takes_colour(Terminal()) == bool(obeys)
    assert asked == ([(41, 7)] if is_console else [])


def test_a_closed_pipe_is_quiet(tmp_path):
    """There a pipe that nobody reads any more is an invalid argument."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.platform = 'win32'\n"
        "from common.console import run\n"
        "def main():\n    raise OSError(22, 'Invalid argument')\nrun(main)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, b"", b"")


def test_an_invalid_name_is_an_error(windows, capsys):
    def main():
        raise OSError(errno.EINVAL, "Invalid argument", "a?.jsonl")

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 2 and "a?.jsonl" in capsys.readouterr().err


def test_torch_without_libuv_finds_the_other_processes(windows, monkeypatch):
    """torch for Windows is built without it, and refuses a store that asks for it, as it does by default."""
    asked = {}

    def store(*_, use_libuv=True, **__):
        asked["libuv"] = use_libuv

    environment = dict(RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=1, TORCHELASTIC_RESTART_COUNT=0)
    environment |= dict(MASTER_ADDR="localhost", TORCHELASTIC_USE_AGENT_STORE=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes.dist, "TCPStore", store)
    monkeypatch.setattr(processes.dist, "PrefixStore", lambda prefix, store: prefix)
    assert processes._rendezvous(None)["rank"] == 0 and asked == {"libuv": False}
    monkeypatch.setenv("USE_LIBUV", "1")
    assert processes._rendezvous(None)["rank"] == 0 and asked == {"libuv": True}


def test_gloo_where_there_is_no_nccl(monkeypatch):
    """NCCL is told its card: else torch warns of a guess."""
    started, card = [], processes.torch.device("cuda", 0)

    def group(kind, device_id=None, **_):
        started.append((kind, device_id))
        raise KeyboardInterrupt

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "pick_device", lambda *_: card)
    monkeypatch.setattr(processes, "_rendezvous", lambda _: {})
    monkeypatch.setattr(processes.torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(processes.dist, "init_process_group", group)
    for there in (False, True):
        monkeypatch.setattr(processes.dist, "is_nccl_available", lambda there=there: there)
        with pytest.raises(KeyboardInterrupt):
            with processes.start(SimpleNamespace(device="cuda", backend="ddp", ddp_timeout=1)):
                pass
    assert started == [("gloo", None), ("nccl", card)]


@pytest.mark.skipif(os.name != "posix", reason="git is played by a shell script")
def test_git_may_complain_in_any_language(monkeypatch, tmp_path):
    """In a copy without git's folder. What is no text in the encoding of the system ended the run: UTF-8 on a Chinese
    Windows, GBK here."""
    git = tmp_path / "git"
    git.write_bytes("#!/bin/sh\necho '不是仓库' >&2\nprintf v1\n".encode("gbk"))
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert logger.git_commit() == "v1"


def test_a_clone_has_the_same_bytes_everywhere():
    """Git for Windows ends lines in CRLF, and `code_version` and hashes of files would be others there."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    names = ["common/files.py", "tokenizer/tokenizer.json", "docs/loss.png", "Makefile"]
    done = subprocess.run(["git", "check-attr", "eol", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name}: eol: lf" for name in names]
    assert not any(b"\r\n" in Path(ROOT / name).read_bytes() for name in names if not name.endswith("png"))
