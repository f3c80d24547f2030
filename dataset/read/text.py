"""Plain text files of any size, read in pieces: data for pretraining that needs no rows."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from common.console import Progress, UserError
from dataset.read.jsonl import BLOCK, BOM, HEAD_BYTES, Chunk, entry_name, refuse_changes, require_file, state_of
from dataset.read.parse import decode
from dataset.tokens.cache import cache_root, get_or_build


class TextFile:
    """A plain text file, with the methods of a `Jsonl` of one row; `chunks` cuts it at line ends.

    Its hash is kept in the cache as the index of a `Jsonl` is, and with it where its parts begin.
    """

    PART = 64 << 20  # bytes between two places where a part may begin

    def __init__(self, path: str | Path, *, cache_dir: str | Path | None = None):
        self.path = require_file(path)
        self.before = os.stat(self.path)  # for `refuse_changes`
        self.cache = cache_root(self.path, cache_dir)
        self.size, state, _ = state_of(self.path)
        if not self.size:
            raise UserError(f"{self.path}:1: the file is empty")
        folder, facts = get_or_build(self.cache, entry_name(self.path, "hash", state), self._build)
        self.content: str = facts["content"]  # SHA-256 of the bytes
        self._cuts: dict[int, int] = dict(facts["cuts"])  # byte at which a line begins -> its number

    def __len__(self) -> int:
        return 1

    def parts(self, size: int, limit: int) -> list[range]:
        """Parts of about `size` bytes, as ranges of bytes; see Jsonl.parts."""
        places = np.array([*self._cuts, self.size])
        count = max(1, self.size // size)
        cuts = np.searchsorted(places, np.linspace(0, self.size, count + 1)[1:-1])
        cuts = np.unique([0, *places[cuts], self.size]).tolist()
        return [range(a, b) for a, b in zip(cuts, cuts[1:])]

    def bytes_of(self, part: range) -> int:
        return len(part)

    def samples(self, count: int, size: int) -> Iterator[Chunk]:
        """Chunks of about `size` bytes from up to `count` places, spread over the file."""
        places = list(self._cuts)
        for place in places[:: -(-len(places) // count)]:
            yield next(self.chunks(size, range(place, self.size)))

    def chunks(self, size: int, part: range | None = None) -> Iterator[Chunk]:
        begin, end = (0, self.size) if part is None else (part.start, part.stop)
        line = self._cuts[begin]
        with open(self.path, "rb") as file:
            file.seek(begin)
            text = b"" if begin else file.read(len(BOM)).removeprefix(BOM)
            while more := file.read(min(size, end - file.tell())):
                text += more
                cut = len(text)
                if len(more) == size:  # not the end: cut at a line end or, in a long line, between two characters
                    last = next((i for i in range(cut - 1, max(cut - 4, 0), -1) if text[i] & 0xC0 != 0x80), cut)
                    cut = text.rfind(b"\n") + 1 or last
                yield Chunk([text[:cut]], np.array([line]))
                line, text = line + text.count(b"\n", 0, cut), text[cut:]
        if text:
            yield Chunk([text], np.array([line]))

    def _build(self, folder: Path) -> dict:
        """Hashes the file, and finds the first line that begins after each PART bytes."""
        self._cuts = cuts = {0: 1}
        first = next(self.chunks(HEAD_BYTES), None)
        if first is None:  # a byte order mark and nothing else
            raise UserError(f"{self.path}:1: the file is empty")
        try:
            decode(first.rows[0])
        except UserError as error:
            raise UserError(f"{self.path}:1: {error}") from None
        digest, position, line, wanted = hashlib.sha256(), 0, 1, self.PART
        with open(self.path, "rb") as file, closing(Progress(f"reading {self.path.name}", self.size)) as progress:
            while block := file.read(BLOCK):
                digest.update(block)
                found = block.find(b"\n", max(0, wanted - position)) + 1 if wanted < position + len(block) else 0
                if found and position + found < self.size:
                    cuts[position + found] = line + block.count(b"\n", 0, found)
                    wanted = position + found + self.PART
                line, position = line + block.count(b"\n"), position + len(block)
                progress.advance(len(block))
        refuse_changes(self.path, self.before)
        return {"source": str(self.path.resolve()), "content": digest.hexdigest(), "cuts": list(cuts.items())}
