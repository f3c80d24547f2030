"""What is worked out once from a data file, kept on disk: line indexes and token caches.

    directory, facts = get_or_build(cache_root(data_file), "pretrain.jsonl-tokens-1f2e", build)

An entry is a directory that is complete as soon as it has its name: it is filled under a temporary name, synced,
renamed. A killed build leaves no half entry, and of several processes that want the same one, one builds and the
others wait. The big arrays are read through `Mapped`, which keeps a file of any size at a few MiB of this process's
memory.
"""

import json
import mmap
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


def cache_root(data_file: Path, cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else `.cache` beside the file, else (read-only data) the user's cache, else the temporary folder."""
    if cache_dir is not None:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        return Path(cache_dir)
    home = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (data_file.parent / ".cache", Path(home) / "sparrow"):
        if is_writable(folder):
            return folder
    return Path(tempfile.gettempdir())


def is_writable(folder: Path) -> bool:
    try:
        # root may write anywhere: a folder without a single write bit is read-only because somebody wants it so
        parent = next(p for p in (folder, *folder.parents) if p.exists())
        if not parent.stat().st_mode & 0o222:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def get_or_build(root: Path, name: str, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    """The entry `root/name` and the facts `build` returned for it; `build` fills a directory, and only if need be."""
    path = root / name
    if (facts := _facts(path)) is not None:
        return path, facts
    lock = root / f"{name}.lock"
    with _locked(lock, f"{name}: waiting for the process that is building it") as alone:
        if (facts := _facts(path)) is not None:
            return path, facts
        for leftover in root.iterdir():  # of a build that was killed, or an entry that was damaged
            if leftover.name == name or alone and leftover.name.startswith(f"{name}.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = root / f"{name}.tmp{socket.gethostname()}-{os.getpid()}"
        temporary.mkdir()
        try:
            facts = build(temporary)
            facts["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            (temporary / "facts.json").write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
            for file in temporary.iterdir():
                _sync(file)
            try:
                os.rename(temporary, path)
            except OSError:  # without locks another process may have been first, with the same
                if (facts := _facts(path)) is None:
                    raise
                shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):  # whoever waits for it will find the entry; Windows keeps it while it is open there
                lock.unlink()
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _forget_older(root, name, facts)
    return path, facts


def _facts(path: Path) -> dict | None:
    """The entry's facts, or None if it is not there or a file of it lost bytes."""
    try:
        facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return facts if whole else None


def _forget_older(root: Path, name: str, facts: dict) -> None:
    """Drops what was made from an earlier content of the same data file: nothing asks for it again."""
    prefix = name.rsplit("-", 2)[0] + "-"
    for other in root.iterdir():
        if other.name.startswith(prefix) and other.name != name:
            theirs = _facts(other)
            if theirs and theirs["source"] == facts["source"] and theirs["content"] != facts["content"]:
                shutil.rmtree(other, ignore_errors=True)


def _sync(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


@contextmanager
def _locked(path: Path, message: str) -> Iterator[bool]:
    """Holds the lock file -> whether it does: on some network drives there are no locks, and at worst two processes do
    the same work. The system frees it when its holder dies, so a killed build blocks nobody."""
    with open(path, "ab") as handle:
        locked = _try_lock(handle)
        if locked is False:
            print(message, file=sys.stderr, flush=True)
            _wait_for_lock(handle)
        yield locked is not None  # closing the file frees it


def _try_lock(handle) -> bool | None:
    """None: there are no locks here."""
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


def _wait_for_lock(handle) -> None:
    if fcntl:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    while _try_lock(handle) is False:  # msvcrt's own waiting gives up after ten seconds
        time.sleep(0.2)


class Mapped:
    """A file as an array that is read in slices: `Mapped(path, np.uint16)[10:20]`, a view into the page cache.

    Pages that were read count as this process's memory until they are handed back, which is done every `KEEP` bytes.
    The system's page cache keeps them, and a view that is still in use reads them again by itself.
    """

    KEEP = 32 << 20
    FAULT = 1 << 16  # one access maps its surroundings too, 64 KiB on Linux

    def __init__(self, path: Path, dtype: type):
        self._touched = 0
        self._map = None
        if os.path.getsize(path) == 0:  # mmap refuses an empty file
            self.array = np.empty(0, dtype)
            return
        with open(path, "rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self.array = np.frombuffer(self._map, dtype)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, where):
        found = self.array[where]
        self._touched += found.nbytes + self.FAULT
        if self._touched > self.KEEP:
            self._touched = 0
            if hasattr(self._map, "madvise"):
                self._map.madvise(mmap.MADV_DONTNEED)
        return found
