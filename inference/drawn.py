"""Between host and device while text is generated: numbers that go there, and drawn tokens that come back, without one
waiting for the other.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LogProb(NamedTuple):
    """Of the model itself: at temperature 1, before penalties and biases."""

    value: float
    likeliest: list[tuple[int, float]]  # (token, log-probability), falling


class LogProbs(NamedTuple):
    """The same for B tokens, on the device."""

    values: Tensor  # (B, 1)
    ids: Tensor  # (B, most)
    likeliest: Tensor  # (B, most)

    @classmethod
    def of(cls, logits: Tensor, chosen: Tensor, most: int) -> LogProbs:
        """logits (B, V), chosen (B,); most: how many of the likeliest tokens to list."""
        log_p = logits.float().log_softmax(-1)
        likeliest, ids = log_p.topk(min(most, log_p.shape[-1]))
        return cls(log_p.gather(-1, chosen[:, None]), ids, likeliest)

    def read(self) -> list[LogProb]:
        rows = zip(self.values.tolist(), self.ids.tolist(), self.likeliest.tolist())
        return [LogProb(value, list(zip(tokens, likeliest))) for (value,), tokens, likeliest in rows]


def to_device(numbers: Sequence[Any] | Tensor, device: torch.device | str) -> Tensor:
    """Through page-locked memory. Any other copy to a GPU waits until it has computed all that is queued."""
    tensor = torch.as_tensor(numbers)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Drawn:
    """The next token of each of these sequences, which a GPU is perhaps still computing. The copy to the host is queued
    right behind; `read` waits for it, and not for what was queued later."""

    def __init__(self, sequences: list, tokens: Tensor, told: Tensor, logprobs: LogProbs | None = None):
        """tokens (B,), on the device; told (B,): what the host is told, -1 where the token says nothing."""
        self.sequences, self.tokens = sequences, tokens
        self._told = _to_host(told)  # a copy also on CPUs: the next replay of a graph overwrites what it has drawn
        self._logprobs = None if logprobs is None else LogProbs(*map(_to_host, logprobs))
        self._copied: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tokens.device))  # not of the current device, if it is another

    def read(self) -> tuple[list[int], list[LogProb | None]]:
        """The tokens, or -1."""
        if self._copied is not None:
            self._copied.synchronize()
        logprobs = [None] * len(self.sequences) if self._logprobs is None else self._logprobs.read()
        return self._told.tolist(), [*logprobs]


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
