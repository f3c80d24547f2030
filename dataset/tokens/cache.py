"""The cache on disk of what is computed once from a data file: line indexes and tokens.

    directory, facts = get_or_build(cache_root(data_file), "pretrain.jsonl-tokens-1f2e", build)

An entry is a folder that exists complete or not at all (common/files.py). If several processes want the same one, one
builds it and the others wait. The big arrays are read through `Mapped`, which keeps a file of any size at a few MiB of
this process's memory.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.console import printable
from common.files import atomic_folder, lock, remove_folder


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
    """The entry `root/name` and its facts. Only if there is no such entry, `build` is called: it fills the folder that
    it is given and returns the facts, which must have a "source" and a "content"."""
    path = root / name
    if (facts := _facts(path)) is not None:
        return path, facts
    lock_file = root / f"{name}.lock"
    with lock(lock_file, printable(f"{name}: waiting for the process that is building it")):
        if (facts := _facts(path)) is not None:
            return path, facts
        remove_folder(path)  # a damaged one
        try:
            with atomic_folder(path) as folder:
                facts = build(folder)
                facts["files"] = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
                (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError:  # without locks, another process may have been first, with the same content
            if (facts := _facts(path)) is None:
                raise
        with suppress(OSError):  # whoever waits for it will find the entry; Windows keeps it while it is open there
            lock_file.unlink()
    _forget_older(root, name, facts)
    return path, facts


def _facts(path: Path) -> dict | None:
    """The entry's facts; None if it does not exist or one of its files has not the size that was written."""
    try:
        facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return facts if whole else None


def _forget_older(root: Path, name: str, facts: dict) -> None:
    """Removes entries that were made from an earlier content of the same data file: nothing asks for them again."""
    prefix = name.rsplit("-", 2)[0] + "-"
    for other in root.iterdir():
        if other.name.startswith(prefix) and other.name != name:
            theirs = _facts(other)
            if theirs and theirs["source"] == facts["source"] and theirs["content"] != facts["content"]:
                remove_folder(other)


class Mapped:
    """A file as an array that is read in slices: `Mapped(path, np.uint16)[10:20]`, a view into the page cache.

    Pages that were read count as this process's memory until they are handed back, which is done every `KEEP` bytes.
    The system's page cache keeps them; a view that is still in use reads them again by itself.
    """

    KEEP = 32 << 20
    FAULT = 1 << 16  # bytes: an access to one page maps its neighbours too, 64 KiB on Linux

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
            if self._map is not None and hasattr(self._map, "madvise"):
                self._map.madvise(mmap.MADV_DONTNEED)
        return found
