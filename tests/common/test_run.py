"""How a program ends: a user's mistake is one line and status 2, a mistake of ours keeps its traceback."""

import errno
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from common.console import UserError, check_writable, explain, run
from common.files import ROOT


def ending(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code, capsys.readouterr().err


def fails_on_purpose(number=0):
    raise UserError("data.jsonl:7: no text; remove the line")


def test_a_users_mistake_is_one_line(capsys):
    assert ending(fails_on_purpose, capsys) == (2, "error: data.jsonl:7: no text; remove the line\n")
    code, text = ending(lambda: Path("/nope/x").read_text(encoding="utf-8"), capsys)  # raised within pathlib
    assert (code, text) == (2, "error: /nope/x: no such file or directory\n")


def test_a_users_mistake_in_a_worker_process_is_one_line_too(capsys):
    with ProcessPoolExecutor(1) as pool:
        assert ending(lambda: list(pool.map(fails_on_purpose, [0])), capsys) == (
            2,
            "error: data.jsonl:7: no text; remove the line\n",
        )


FULL = """CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 11.60 GiB of which 5.12 MiB \
is free. Of the allocated memory 11.2 GiB is allocated by PyTorch, and 0 bytes is reserved but unallocated."""


def test_no_memory_is_one_line_that_says_what_to_do(capsys):
    """eval_model.py, the server and others ended in a traceback on a card that was too small or full."""

    def main(error):
        raise error

    code, text = ending(lambda: main(RuntimeError(FULL)), capsys)  # torch.OutOfMemoryError is one
    assert code == 2 and text == (
        "error: out of memory: Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 11.60 GiB of which 5.12 MiB "
        "is free. See in nvidia-smi what else is there, use a smaller model, or use --device cpu\n"
    )
    assert ending(lambda: main(MemoryError()), capsys) == (2, "error: out of memory: use a smaller model\n")
    with pytest.raises(RuntimeError, match="shapes"):
        run(lambda: main(RuntimeError("shapes do not fit")))


@pytest.mark.parametrize(
    "bug", [lambda: int("x"), lambda: json.loads("{"), lambda: {}["key"], lambda: "é".encode("ascii")]
)
def test_our_own_mistake_keeps_its_traceback(bug):
    with pytest.raises((ValueError, KeyError)):
        run(bug)


def test_a_traceback_cannot_steer_the_terminal():
    """The message of a bug may quote a row of a file."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom common.console import run\n"
        "def main():\n    raise RuntimeError('a \\x1b[2J row')\nrun(main)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "RuntimeError: a ␛[2J row" in done.stderr and "\x1b" not in done.stderr


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("SPARROW_TRACEBACK", "1")
    with pytest.raises(ValueError):
        run(fails_on_purpose)


def test_ctrl_c_is_one_word(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert ending(interrupted, capsys) == (130, "interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="no pipes of this kind")
def test_a_closed_pipe_is_quiet():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom common.console import run\n"
        "run(lambda: [print('a line') for _ in range(100_000)])"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=pipe, stderr=pipe) as process:
        process.stdout.readline()
        process.stdout.close()  # as `head -1` does
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_what_the_system_says_is_said_with_a_way_out():
    assert explain(OSError(errno.ENOSPC, "No space left", "a.pth")).startswith("a.pth: the disk is full; free")
    assert "permission denied" in explain(PermissionError(errno.EACCES, "Permission denied", "/nowhere/x"))
    assert explain(FileNotFoundError("no weights named sft")) == "no weights named sft"


def test_a_directory_that_cannot_be_written_is_known_at_once(tmp_path):
    """It was noticed at the first save, after a whole --save_interval of training."""
    check_writable(str(tmp_path / "new" / "out"))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=re.escape(f"--save_dir {folder}: nothing can be written there")):
            check_writable(str(folder))


def test_a_result_that_cannot_be_written_is_known_at_once(tmp_path):
    """It was noticed after the evaluation, whose figures were lost."""
    check_writable(str(tmp_path / "new" / "result.json"), "--json", is_file=True)
    (tmp_path / "file").touch()
    check_writable(str(tmp_path / "file"), "--json", is_file=True)  # will be replaced
    with pytest.raises(UserError, match=re.escape(f"--json {tmp_path}: is a directory, expected a file")):
        check_writable(str(tmp_path), "--json", is_file=True)
    with pytest.raises(UserError, match=re.escape(f"--png {tmp_path / 'file' / 'a.png'}: nothing can be written")):
        check_writable(str(tmp_path / "file" / "a.png"), "--png", is_file=True)
