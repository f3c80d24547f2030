"""A conversation: each reply computes only what was not read or written before.

    session = Session(model)
    for token in session.reply(ids, Sampling(), max_new_tokens=256, stop=tokenizer.stop_ids):
        print(stream.push(token), end="", flush=True)
    for token in session.reply(longer_ids, ...):         # ids, the reply and more: reads only the "more"

The caller always gives the whole prompt. The engine keeps what it has read and written, so turns may be changed,
removed or interrupted without telling the session.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Set

from inference.engine import Engine, Request, follow
from inference.sampling import Sampling
from model.transformer import CausalLM


class Session:
    """An engine with one sequence, whose memory grows with the conversation."""

    def __init__(self, model: CausalLM, prompt_lookup_num_tokens: int = 0):
        self.model, self.most_guessed = model, prompt_lookup_num_tokens
        self.engine: Engine | None = None
        self.speed = ""  # of the last reply, as a sentence

    def reply(self, ids: list[int], sampling: Sampling, *, max_new_tokens: int, stop: Set[int]) -> Iterator[int]:
        """Yields the ids of the reply to the prompt `ids`. May be abandoned at any time (close(), an exception)."""
        most, limit = len(ids) + max_new_tokens, self.model.config.max_position_embeddings
        if self.engine is None or self.engine.capacity < most:
            capacity = max(most, min(2 * most, limit))
            self.engine = Engine(self.model, 1, capacity, prompt_lookup_num_tokens=self.most_guessed)
        sequence = self.engine.submit(Request(ids, sampling, max_new_tokens, frozenset(stop)))
        try:
            yield from follow(self.engine, sequence)
        finally:
            end, said = time.perf_counter(), len(sequence.tokens)
            first = sequence.first_token or end
            self.speed = (
                f"read {len(ids) - sequence.cached_tokens} tokens ({sequence.cached_tokens} from the cache) in "
                f"{first - sequence.submitted:.2f} s, wrote {said} at {max(said - 1, 0) / max(end - first, 1e-9):.0f} "
                "tokens/s"
            )
            if self.most_guessed:
                self.speed += f", {sequence.guessed} of them guessed from the text"
