"""Rows that are the same: told by 8-byte hashes of the canonical rows.

Among a billion different rows the chance that any two have the same hash is 3 %.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from common.console import UserError
from dataset.read.jsonl import Jsonl
from dataset.read.mapping import Mapping, find_reader
from dataset.read.mix import encode

READ_BYTES = 2 << 20  # bytes of rows read at a time
PART = 64 << 20  # bytes of hashes compared at once


def content_hash(row: dict) -> int:
    data = encode(row).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def hashes_of(path: str | Path, *, mapping: Mapping | None = None, cache_dir: str | Path | None = None) -> np.ndarray:
    """(rows,) uint64: the sorted hashes of a file's rows. Rows that cannot be read are left out."""
    if Path(path).suffix.lower() == ".txt":
        raise UserError(f"{path}: is one text, which has no rows that could be in another file too")
    source = Jsonl(path, cache_dir=cache_dir)
    read = find_reader(source, mapping=mapping)

    def hashes() -> Iterator[int]:
        for chunk in source.chunks(READ_BYTES):
            for raw in chunk.rows:
                with suppress(Exception):  # whatever is wrong with the row: `examine` of this file tells it
                    yield content_hash(read(raw))

    return np.sort(np.fromiter(hashes(), np.uint64))


def found_in(hashes: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """Which of `hashes` are in the sorted `known`, as indices."""
    if known is None or not len(known):
        return np.empty(0, np.int64)
    return np.flatnonzero(known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes)


class RowHashes:
    """Pairs of (hash, row) in temporary files: 16 bytes a row. Equal hashes are in the same file, so each file is
    compared alone, and there are as many files as it takes for one to fit into memory."""

    PAIR = np.dtype([("hash", np.uint64), ("row", np.int64)])

    def __init__(self, stack: ExitStack, rows: int, folder: Path):
        """`stack` closes the files; `rows` is how many there will be."""
        count = min(1 + rows * self.PAIR.itemsize // PART, 200)
        self.files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(count)]

    def add(self, hashes: np.ndarray, rows: list[int]) -> None:
        pairs = np.empty(len(rows), self.PAIR)
        pairs["hash"], pairs["row"] = hashes, rows
        which = hashes % np.uint64(len(self.files))
        for i, file in enumerate(self.files):
            file.write(pairs[which == i].tobytes())

    def repeated(self) -> list[int]:
        """Rows that are the same as an earlier one, in order."""
        found = [np.empty(0, np.int64)]
        for file in self.files:
            file.seek(0)
            pairs = np.frombuffer(file.read(), self.PAIR)
            order = np.lexsort((pairs["row"], pairs["hash"]))
            later = pairs["hash"][order][1:] == pairs["hash"][order][:-1]
            found.append(pairs["row"][order][1:][later])
        return np.sort(np.concatenate(found)).tolist()
