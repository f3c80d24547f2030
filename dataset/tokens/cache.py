"""The cache on disk of what is computed once from a data file: line indexes and tokens.

    directory, facts = get_or_build(cache_root(data_file), "pretrain.jsonl-tokens-1f2e", build)

An entry is a folder that exists complete or not at all (common/files.py). If several processes want the same one, one
builds it and the others wait. An entry's `facts.json` was modified when the entry was last asked for, give or take a
day; by this, scripts/clean_cache.py finds those that nobody uses. The big arrays are read through `Mapped`, which keeps
a file of any size at a few MiB of this process's memory.
"""

import json
import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import UserError, note, printable
from common.files import atomic_folder, lock, remove_folder

FACTS = "facts.json"
DAY = 86400  # seconds


def user_cache() -> Path:
    """Where caches go whose data lie in a folder that is read-only."""
    home = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "sparrow"


def cache_root(data_file: Path, cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else `.cache` beside the file, else (read-only data) the user's cache, else the temporary folder.

    The folder is not made before something is put into it.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    beside = data_file.parent / ".cache"
    return next((folder for folder in (beside, user_cache()) if is_writable(folder)), Path(tempfile.gettempdir()))


def is_writable(folder: Path) -> bool:
    """Whether files can be written into the folder or, where it does not exist yet, into the one it would be made in.
    Nothing is left there by asking."""
    try:
        # root may write anywhere: a folder without a single write bit is read-only because somebody wants it so
        existing = _existing(folder)
        if not existing.stat().st_mode & 0o222:
            return False
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def require_space(root: Path, size: float, what: str) -> str:
    """UserError if the disk of `root` has less than `size` bytes free. Returns how many there are, in words."""
    free = shutil.disk_usage(_existing(root)).free
    if size > free:
        raise UserError(
            f"{what} need about {size / 1e9:,.1f} GB in {root}, where {free / 1e9:,.1f} GB are free; make room, or "
            "name a folder on another disk with --cache_dir"
        )
    return f"{free / 1e9:,.1f} GB free"


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def find_entry(root: Path, name: str) -> tuple[Path, dict] | None:
    """The entry `root/name` and its facts, if it is there and complete."""
    path = root / name
    facts = _facts(path)
    if facts is None:
        return None
    with suppress(OSError):  # a cache that is read-only is used all the same
        if time.time() - (path / FACTS).stat().st_mtime > DAY:
            os.utime(path / FACTS)
    return path, facts


def get_or_build(root: Path, name: str, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    """The entry `root/name` and its facts. Only if there is no such entry, `build` is called: it fills the folder that
    it is given and returns the facts, which must have a "source" and a "content". If it fails, nothing is left, nor the
    cache's own folder if that was empty."""
    if found := find_entry(root, name):
        return found
    path, lock_file, is_new = root / name, root / f"{name}.lock", _made(root)
    still_open = False  # a lock file of ours, which Windows keeps until then; that of another process stays
    try:
        with lock(lock_file, printable(f"{name}: waiting for the process that is building it")):
            if found := find_entry(root, name):
                return found
            try:
                remove_folder(path)  # a damaged one
                with atomic_folder(path) as folder:
                    facts = build(folder)
                    facts["files"] = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
                    (folder / FACTS).write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
            except OSError:  # without locks, another process may have been first, with the same content
                if (facts := _facts(path)) is None:
                    raise
            finally:
                try:
                    lock_file.unlink()  # whoever waits for it looks for the entry
                except OSError:
                    still_open = True
    except BaseException:
        with suppress(OSError):
            if still_open:
                lock_file.unlink()
        with suppress(OSError):  # not empty, or another process has removed it
            root.rmdir()
        raise
    if is_new:  # said once, by whoever makes the folder, since it may come to take much space
        note(f"cache: line indexes and tokens are kept in {root} (--cache_dir names another place)")
    _forget_older(root, name, facts)
    return path, facts


def _made(root: Path) -> bool:
    """Makes the cache's folder -> whether it is this process that did."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir()
        return True
    except FileExistsError:
        return False


def _facts(path: Path) -> dict | None:
    """The entry's facts; None if it does not exist, or is not what was written: other facts, a file of another size."""
    try:
        facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
        whole = {"source", "content"} <= facts.keys() and all(
            (path / name).stat().st_size == size for name, size in facts["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if whole else None


# Files that nothing asks for: references of DPO as they were before they were entries, and locks of killed processes
LEFT = re.compile(r".+-(reference-[0-9a-f]{16}\.npy|\w+-[0-9a-f]{16}\.lock)")


def compiled_cache() -> Path:
    """Where torch.compile keeps its kernels. Its own place is the temporary folder, which is empty after a restart."""
    return user_cache() / "compiled"


class Entry(NamedTuple):
    path: Path
    about: str  # what it was made from
    used: float  # when it was last asked for, in seconds since 1970, give or take a day
    size: int  # bytes

    def remove(self) -> None:
        if self.path.is_file():
            self.path.unlink(missing_ok=True)
        else:
            remove_folder(self.path)


def entries(root: Path) -> list[Entry]:
    """All that is ours in a cache and complete, those first that were not used for longest."""
    found = []
    for path in root.iterdir():
        with suppress(FileNotFoundError):  # another process is removing it, or compiles
            if (entry := _entry(path)) is not None:
                found.append(entry)
    return sorted(found, key=lambda entry: entry.used)


def _entry(path: Path) -> Entry | None:
    """What is at `path`, if it is ours and complete."""
    if path.name.startswith("."):  # being written, or being removed
        return None
    if (facts := _facts(path)) is not None:
        gone = "" if Path(facts["source"]).exists() else ", which is gone"
        used, size = (path / FACTS).stat().st_mtime, sum(facts["files"].values())
        return Entry(path, f"of {facts['source']}{gone}", used, size)
    if LEFT.fullmatch(path.name) and path.is_file():
        written, size = path.stat().st_mtime, path.stat().st_size
        at_work = path.suffix == ".lock" and time.time() - written < DAY
        return None if at_work else Entry(path, "which nothing asks for any more", written, size)
    if path == compiled_cache():
        files = [file.stat() for file in path.rglob("*") if file.is_file()]
        newest = max((file.st_mtime for file in files), default=path.stat().st_mtime)
        return Entry(path, "of torch.compile", newest, sum(file.st_size for file in files))
    return None


def _forget_older(root: Path, name: str, facts: dict) -> None:
    """Removes entries that were made from an earlier content of the same data file: nothing asks for them again."""
    prefix = name.rsplit("-", 2)[0] + "-"
    for other in os.listdir(root):
        if other.startswith(prefix) and other != name:
            theirs = _facts(root / other)
            if theirs and theirs["source"] == facts["source"] and theirs["content"] != facts["content"]:
                remove_folder(root / other)


class Mapped:
    """A file as an array that is read in slices: `Mapped(path, np.uint16)[10:20]`, a view into the page cache.

    The file is opened when it is first read, and stays open: a map costs a file descriptor. Pages that were read count
    as this process's memory until they are handed back, which is done every `KEEP` bytes. The system's page cache keeps
    them; a view that is still in use reads them again by itself.
    """

    KEEP = 32 << 20
    FAULT = 1 << 16  # bytes: an access to one page maps its neighbours too, 64 KiB on Linux

    def __init__(self, path: Path, dtype: type):
        self.path, self.dtype = path, np.dtype(dtype)
        self._touched = 0
        self._map = None

    @cached_property
    def array(self) -> np.ndarray:
        if not len(self):  # mmap refuses an empty file
            return np.empty(0, self.dtype)
        with open(self.path, "rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, self.dtype)

    @cached_property
    def _length(self) -> int:
        return os.path.getsize(self.path) // self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where):
        found = self.array[where]
        self._touched += found.nbytes + self.FAULT
        if self._touched > self.KEEP:
            self._touched = 0
            if self._map is not None and hasattr(self._map, "madvise"):
                self._map.madvise(mmap.MADV_DONTNEED)
        return found

    def will_read(self, start: int, stop: int) -> None:
        """Tells the system to read these elements from the disk already, while this process does something else."""
        start, stop = (max(0, min(at, len(self))) * self.dtype.itemsize for at in (start, stop))
        start -= start % mmap.PAGESIZE
        if start < stop and self.array is not None and self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_WILLNEED, start, stop - start)
