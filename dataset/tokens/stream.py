"""Documents of several token caches, read as one stream of ids.

stream = Stream(caches, whole(caches), end_of_text)
stream.read(1024, 1537)        # 513 ids, from wherever they are
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dataset.tokens.token_cache import TokenCache

END = -1  # in Pieces.cache: one <|endoftext|>


class Pieces(NamedTuple):
    """What a stream is made of, in order: n ranges of tokens."""

    cache: np.ndarray  # (n,) int32, which of the caches, or END
    start: np.ndarray  # (n,) int64, in the cache's tokens
    stop: np.ndarray  # (n,) int64


def piece(cache: int, start, stop) -> Pieces:
    """One or several ranges of one cache, without the empty ones."""
    start, stop = np.atleast_1d(np.asarray(start, np.int64)), np.atleast_1d(np.asarray(stop, np.int64))
    kept = start < stop
    return Pieces(np.full(int(kept.sum()), cache, np.int32), start[kept], stop[kept])


def joined(parts: list[Pieces]) -> Pieces:
    return Pieces(*(np.concatenate(own) for own in zip(*parts)))


class Stream:
    """The pieces one after the other, and one <|endoftext|> that ends the last document.

    `end` is the id of <|endoftext|>.
    """

    def __init__(self, caches: list[TokenCache], pieces: list[Pieces], end: int):
        self.caches = caches
        self.pieces = joined([*pieces, piece(END, 0, 1)])
        # of each piece in the stream, and the end
        self.starts = np.cumsum([0, *(self.pieces.stop - self.pieces.start)])
        self.length = int(self.starts[-1])
        self._end = np.array([end], np.uint32)

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(cache, start there, stop there) of stream[start:stop]"""
        first = self._piece(start)
        last = int(np.searchsorted(self.starts, stop, side="left"))
        own, begins, ends = (values[first:last].tolist() for values in self.pieces)
        for cache, begin, end, at in zip(own, begins, ends, self.starts[first:last].tolist()):
            yield cache, begin + max(start - at, 0), min(end, begin + stop - at)

    def read(self, start: int, stop: int) -> np.ndarray:
        parts, end = [], self._end
        for cache, a, b in self._ranges(start, stop):
            if cache != END:
                parts.append(self.caches[cache].tokens[a:b])
                end = end.astype(parts[-1].dtype, copy=False)
            else:
                parts.append(end)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def will_read(self, start: int, stop: int) -> None:
        for cache, a, b in self._ranges(start, stop):
            if cache != END:
                self.caches[cache].tokens.will_read(a, b)

    def source(self, position: int) -> str:
        which = self._piece(position)
        if self.pieces.cache[which] == END and which + 1 < len(self.pieces.cache):  # it opens what follows
            which, position = which + 1, int(self.starts[which + 1])
        cache = self.caches[int(self.pieces.cache[which])]
        token = int(self.pieces.start[which]) + position - int(self.starts[which])
        return cache.where(int(np.searchsorted(cache.offsets.array, token, side="right")) - 1)

    def _piece(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1
