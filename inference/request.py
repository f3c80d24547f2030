"""What is asked of the engine, and what has become of it."""

from __future__ import annotations

import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

from inference.drawn import LogProb
from inference.lookup import Lookup
from inference.sampling import Said, Sampling
from inference.slots import Slot


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 1024  # 0: only read the prompt
    stop: AbstractSet[int] = frozenset()  # tokens that end the answer
    logprobs: int | None = None  # how many of the likeliest tokens to list with each token's log-probability
    prompt_logprobs: bool = False  # the same for the prompt's tokens


class Sequence:
    """A request and what has become of it. Other threads may read it at any time."""

    def __init__(self, request: Request, generator: torch.Generator | None):
        self.request, self.generator = request, generator
        self.tokens: list[int] = []  # without the token that ended it
        self.logprobs: list[LogProb] = []  # of tokens, and of `end` if there is one
        self.prompt_logprobs: list[LogProb] = []  # of prompt[1:]
        self.end: int | None = None  # the stop token that ended it
        self.finish_reason: str | None = None  # None while it runs | stop | length | cancelled | error
        self.error: BaseException | None = None
        self.cached_tokens = 0  # of the prompt, that did not have to be read
        self.submitted, self.first_token = time.perf_counter(), 0.0  # seconds
        self.cancelled = False
        self.slot: Slot | None = None
        self.said = Said(request.sampling, request.prompt, request.stop) if Said.needed(request.sampling) else None
        self.lookup: Lookup | None = None
        self.guessed = 0  # tokens that were right before they were drawn

    def cancel(self) -> None:
        """It will get no further token than the one that is being computed."""
        self.cancelled = True


def slot_of(sequence: Sequence) -> Slot:
    assert sequence.slot is not None
    return sequence.slot


def lookup_of(sequence: Sequence) -> Lookup:
    assert sequence.lookup is not None
    return sequence.lookup
