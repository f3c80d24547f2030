"""What a program says to its user: mistakes in one line, the progress of long work, and only what is safe to print.

if __name__ == "__main__":
    run(main)      # UserError, no memory: one line and status 2; Ctrl-C: 130; any other exception: its traceback
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from common.files import ROOT, allow_many_files

# What could steer a terminal or hide what is written, and what is printed instead: C0 controls become Unicode's control
# pictures (ESC: ␛); DEL, C1, marks that change the direction of writing and halves of surrogate pairs become U+FFFD.
UNSAFE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
for _codes in (range(0x7F, 0xA0), (0x061C, 0x200E, 0x200F), range(0x202A, 0x202F), range(0x2066, 0x206A)):
    UNSAFE |= dict.fromkeys(_codes, "\ufffd")
UNSAFE |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")

NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE)


class Coloured(str):
    """Text that is safe to print and has our own colours in it: `printable` leaves it alone."""


def printable(text: str, one_line: bool = False) -> str:
    """Text that may come from a file (a row, a name, a model's answer), safe to print on a terminal.

    one_line  line breaks are shown too, so that what is quoted in a message cannot look like another message
    """
    if isinstance(text, Coloured):
        return text
    return text.translate(UNSAFE | {10: "␊"} if one_line else UNSAFE)


def say(text: str) -> None:
    """Prints a result, to stdout."""
    print(printable(text), flush=True)


def note(text: str) -> None:
    """Prints a remark beside the results, to stderr."""
    print(printable(text), file=sys.stderr, flush=True)


class UserError(ValueError):
    """A mistake that the user can correct. Its message names the file, line or flag, the value, and what to do.

    `run` prints it in one line; every other exception is a bug and keeps its traceback.
    """


def width_of(text: str) -> int:
    """Places that it takes in a terminal: two for Chinese characters, none for accents that are added."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, width: int) -> str:
    """At most so wide."""
    while width_of(text) > width:
        text = text[:-1]
    return text


def takes_colour(stream: TextIO) -> bool:
    """Whether colours belong into it: a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and _obeys_escapes(stream)


def _obeys_escapes(stream: TextIO) -> bool:
    """Whether escape sequences have an effect there. A console of Windows prints them, unless it is asked to obey."""
    if sys.platform != "win32":
        return True
    import ctypes
    import msvcrt

    kernel, mode = ctypes.windll.kernel32, ctypes.c_uint32()
    handle = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno()))
    obey = 4  # ENABLE_VIRTUAL_TERMINAL_PROCESSING
    return bool(kernel.GetConsoleMode(handle, ctypes.byref(mode)) and kernel.SetConsoleMode(handle, mode.value | obey))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the machine's. torch raises a RuntimeError of its own, or a plain one."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def run(main: Callable[[], Any], smaller: str = "use a smaller model") -> None:
    """Calls main(). A user's mistake is printed in one line, and so is that memory ran out; a bug with its traceback.

    smaller  what the program can do with less memory

    SPARROW_TRACEBACK=1 in the environment: mistakes are printed with their traceback, too.
    The exit status is 2 after a mistake, 130 after Ctrl-C, 141 if whoever read the output (`| head`) has closed it.
    """
    allow_many_files()
    sys.excepthook = _print_traceback
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a console that lacks a character must not end the program
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error) or os.environ.get("SPARROW_TRACEBACK", "0") != "0":
            raise
        asked = re.search(r"Tried to allocate.*? is free\.", str(error))  # torch's, of a GPU: how much, of how much
        way = f"{asked[0]} See in nvidia-smi what else is there, {smaller}, or use --device cpu" if asked else smaller
        print(f"error: out of memory: {printable(way, one_line=True)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (UserError, OSError) as error:
        if _is_closed_pipe(error):  # `... | head`: the reader has left, so nothing more can be written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        bug = isinstance(error, OSError) and not _raised_in_our_code(error)
        if bug or os.environ.get("SPARROW_TRACEBACK", "0") != "0":
            raise
        print(f"error: {printable(explain(error), one_line=True)}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_closed_pipe(error: Exception) -> bool:
    """Windows calls it an invalid argument, and names no file."""
    if sys.platform == "win32" and isinstance(error, OSError) and error.filename is None:
        return error.errno == errno.EINVAL or isinstance(error, BrokenPipeError)
    return isinstance(error, BrokenPipeError)


def _print_traceback(kind: type[BaseException], error: BaseException, frames: Any) -> None:
    """As Python does it, but a text of a file in the message cannot steer the terminal."""
    import traceback

    print(printable("".join(traceback.format_exception(kind, error, frames))), file=sys.stderr, end="", flush=True)


def _raised_in_our_code(error: OSError) -> bool:
    """Whether our code or the standard library, called by it, raised it: then it is about a file of the user's.

    An OSError of another package may be a bug, and needs its traceback.
    """
    import traceback

    library = os.path.dirname(os.__file__)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if not _belongs(frame.f_code.co_filename, library)]
    return bool(frames) and _belongs(frames[-1].f_code.co_filename, str(ROOT))


def _belongs(filename: str, folder: str) -> bool:
    """Whether a source file is part of this folder; packages installed in it (.venv) do not count."""
    path = os.path.realpath(filename)
    if filename.startswith("<frozen "):  # parts of the standard library
        return folder != str(ROOT)
    return path.startswith(os.path.realpath(folder) + os.sep) and "site-packages" not in Path(path).parts


def explain(error: BaseException) -> str:
    """The error's message; for an error of the operating system, the file and what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    return where + {
        errno.ENOSPC: "the disk is full; free some space and start again, a training with --from_resume auto",
        errno.ENOENT: "no such file or directory",
        errno.EACCES: "permission denied; choose another place or change its owner",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.EISDIR: "is a directory, expected a file",
        errno.EMFILE: "too many files are open; raise the limit (`ulimit -n 65536`), or join the data files "
        "(scripts/prepare_data.py)",
        errno.EADDRINUSE: "the port is in use; choose another",
    }.get(error.errno, error.strerror or str(error))


def check_writable(path: str, flag: str = "--save_dir", is_file: bool = False) -> None:
    """UserError if nothing can be written to `path`: better now than after hours of work.

    flag     the option that named it
    is_file  `path` is a file to be written, else a directory
    """
    target = Path(path).absolute()
    if is_file and target.is_dir():
        raise UserError(f"{flag} {path}: is a directory, expected a file; add a file's name")
    folder = next(place for place in (target.parent if is_file else target, *target.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"-")
    except OSError as error:
        reason = error.strerror if folder.is_dir() else f"{folder} is not a directory"
        raise UserError(f"{flag} {path}: nothing can be written there ({reason}); choose another") from None


class Progress:
    """Progress of long work on stderr: a bar on a terminal, elsewhere a line every ten seconds.

    what  what is being done, e.g. "tokenising a.jsonl"
    size  the whole work, in units ("B": bytes)
    """

    def __init__(self, what: str, size: int, unit: str = "B"):
        self.what, self.size, self.unit, self.done, self.bar = printable(what), size, unit, 0, None
        self.began = self.printed = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            # delay: seconds before it shows. leave None: below another bar it disappears in the end
            self.bar = tqdm(total=size, desc=self.what, unit=unit, unit_scale=True, delay=1, leave=None)

    def advance(self, size: int) -> None:
        """Another `size` units are done."""
        self.done += size
        now = time.monotonic()
        if self.bar:
            self.bar.update(size)
        elif now - self.printed > 10:
            self.printed = now
            rate = self.done / (now - self.began)
            rate = f"{rate / 1e6:.1f} MB/s" if self.unit == "B" else f"{rate:,.1f} {self.unit.strip()}/s"
            note(f"{self.what}: {self.done / self.size:.0%}, {rate}")

    def close(self) -> None:
        if self.bar:
            self.bar.close()
