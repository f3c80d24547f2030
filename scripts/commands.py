"""Commands of this repository, run by programs that consist of several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def call(
    words: Sequence[object], line: Callable[[str], None], *, cwd: Path | None = None, with_stderr: bool = False
) -> None:
    """Runs a script of ours. Ends this program with its exit status if that is not 0.

    words        the script and its flags
    line         called with each line that it prints, without the line's end
    cwd          the directory it runs in; None: ours
    with_stderr  `line` gets what it prints to stderr, too; else that goes to our own stderr

    The terminal sends Ctrl-C to the script as well, and a training then saves. SIGTERM comes to this program alone and
    is passed on.
    """
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if with_stderr else None,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout
    before = [
        signal.signal(signal.SIGINT, lambda *_: None),
        signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    ]
    try:
        for text in process.stdout:
            line(text.rstrip("\n"))
        if process.wait():
            raise SystemExit(process.returncode)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
