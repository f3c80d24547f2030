"""One growing text and its cache: a conversation in which every answer computes only what is new.

    session = Session(model)
    for token in session.reply(ids, Sampling(), max_new_tokens=256, stop=tokenizer.stop_ids):
        print(stream.push(token), end="", flush=True)
    for token in session.reply(longer_ids, ...):         # ids, the reply and more: reads only the "more"

The prompt is always given whole; the cache is set back to the ids that it shares with what was read and said before. So
nothing has to be told about a turn that was changed, forgotten or interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from inference.decode import KVCache, Sampling, decode
from model.transformer import CausalLM


class Session:
    def __init__(self, model: CausalLM):
        self.model = model
        self.cache: KVCache | None = None
        self.cached: list[int] = []  # the ids whose keys and values the cache holds
        self.speed = ""  # of the last reply, in words

    def reply(self, ids: list[int], sampling: Sampling, *, max_new_tokens: int, stop: set[int]) -> Iterator[int]:
        """Ids of the reply as they come. It may be left at any moment, by closing it or by an exception."""
        complete = shared = self._recall(ids, max_new_tokens)
        said: list[int] = []
        start = read = time.perf_counter()
        try:
            options = dict(max_new_tokens=max_new_tokens, stop=stop, cache=self.cache)
            for (token,) in decode(self.model, [ids], sampling, **options):
                # Ctrl-C can strike while a token is between two layers: only what is cached now is whole.
                complete = self.cache.length
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

    def _recall(self, ids: list[int], more: int) -> int:
        """Sets the cache back to what it shares with ids -> how many those are; never all, one has to be read anew."""
        if self.cache is None or self.cache.capacity < len(ids) + more:
            weight = self.model.model.embed_tokens.weight
            capacity = max(len(ids) + more, min(2 * (len(ids) + more), self.model.config.max_position_embeddings))
            self.cache, self.cached = KVCache(self.model.config, 1, capacity, weight.dtype, weight.device), []
        shared = 0
        while shared < min(len(self.cached), len(ids) - 1) and self.cached[shared] == ids[shared]:
            shared += 1
        self.cache.length = shared
        return shared
