"""The documents of several token caches, read as one stream of ids."""

from __future__ import annotations

import numpy as np

from dataset.tokens.token_cache import TokenCache


class Stream:
    """The tokens of several caches one after the other, and one <|endoftext|> that ends the last document."""

    def __init__(self, caches: list[TokenCache]):
        self.caches = caches
        self.starts = np.cumsum([0, *(len(cache.tokens) for cache in caches)])
        self.length = int(self.starts[-1]) + 1

    def read(self, start: int, stop: int, end: int) -> np.ndarray:
        parts = []
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for cache, begin in zip(self.caches[first:], self.starts[first:].tolist()):
            if begin >= stop:
                break
            parts.append(cache.tokens[max(start - begin, 0) : stop - begin])
        if stop >= self.length:
            parts.append(np.array([end], parts[0].dtype if parts else np.uint32))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def source(self, position: int) -> str:
        which = int(np.searchsorted(self.starts, position, side="right")) - 1
        cache = self.caches[which]
        document = int(np.searchsorted(cache.offsets.array, position - int(self.starts[which]), side="right")) - 1
        return f"{cache.path}:{cache.lines[document]}"
