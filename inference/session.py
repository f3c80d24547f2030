"""A conversation and its cache: each reply computes only what was not read or written before.

    session = Session(model)
    for token in session.reply(ids, Sampling(), max_new_tokens=256, stop=tokenizer.stop_ids):
        print(stream.push(token), end="", flush=True)
    for token in session.reply(longer_ids, ...):         # ids, the reply and more: reads only the "more"

The caller always gives the whole prompt. The session keeps the part of the cache that agrees with it, so turns may be
changed, removed or interrupted without telling the session.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from inference.cache import KVCache
from inference.decode import decode
from inference.sampling import Sampling
from model.transformer import CausalLM


class Session:
    """The cache of one conversation with a model."""

    def __init__(self, model: CausalLM):
        self.model = model
        self.cache: KVCache | None = None
        self.cached: list[int] = []  # the ids whose keys and values the cache holds
        self.speed = ""  # of the last reply, as a sentence

    def reply(self, ids: list[int], sampling: Sampling, *, max_new_tokens: int, stop: set[int]) -> Iterator[int]:
        """Yields the ids of the reply to the prompt `ids`. May be abandoned at any time (close(), an exception)."""
        cache, shared = self._recall(ids, max_new_tokens)
        complete = shared
        said: list[int] = []
        start = read = time.perf_counter()
        try:
            for (token,) in decode(self.model, [ids], sampling, max_new_tokens=max_new_tokens, stop=stop, cache=cache):
                assert token is not None  # a single row ends the loop
                # Ctrl-C can come between two layers of the next token: what is cached now is complete in all of them
                complete = cache.length
                read = time.perf_counter() if not said else read
                said.append(token)
                yield token
        finally:
            self.cached = (ids + said)[:complete]
            rate = max(len(said) - 1, 0) / max(time.perf_counter() - read, 1e-9)
            self.speed = (
                f"read {len(ids) - shared} tokens ({shared} from the cache) in {read - start:.2f} s, "
                f"wrote {len(said)} at {rate:.0f} tokens/s"
            )

    def _recall(self, ids: list[int], more: int) -> tuple[KVCache, int]:
        """A cache with room for `ids` and `more`, holding the longest common beginning of `ids` and what was cached ->
        (cache, length of that beginning). Never all of `ids`: the logits after the last one are needed."""
        if self.cache is None or self.cache.capacity < len(ids) + more:
            weight = self.model.model.embed_tokens.weight
            capacity = max(len(ids) + more, min(2 * (len(ids) + more), self.model.config.max_position_embeddings))
            self.cache, self.cached = KVCache(self.model.config, 1, capacity, weight.dtype, weight.device), []
        shared = 0
        while shared < min(len(self.cached), len(ids) - 1) and self.cached[shared] == ids[shared]:
            shared += 1
        self.cache.length = shared
        return self.cache, shared
