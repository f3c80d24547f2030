"""How the next token is drawn from the model's logits.

    Sampling(temperature=0)                                      # greedy
    draw(logits, SamplingRows.of([one, another]), noise)         # each row by its own settings

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from common.console import UserError
from inference.drawn import to_device

# Sorting a vocabulary takes a CPU 1 ms a row. The most likely tokens nearly always hold top_p's probability alone, and
# picking them out takes a tenth of that.
LIKELIEST = 256

# What is less is 0 in fp32, and then no token is left.
LEAST_TOP_P = torch.finfo(torch.float32).tiny

# Logits divided by less may be infinite in fp32, and then the probabilities are NaN.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """temperature 0 (or below 1e-5) takes the likeliest token; top_k 0, top_p 1 and min_p 0 keep all tokens.
    seed None: another every time. The order is Hugging Face's: penalties, bias, temperature, top_k, top_p, min_p."""

    temperature: float = 0.85
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0  # drop tokens with less than this share of the likeliest one's probability (arXiv:2407.01082)
    presence_penalty: float = 0.0  # subtracted once from the logit of each token that was said (OpenAI's)
    frequency_penalty: float = 0.0  # subtracted as often as it was said
    logit_bias: dict[int, float] = field(default_factory=dict)  # {token id: added to its logit}

    def __post_init__(self):
        limits = [
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p < 1, "0 (off) or more, below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 = off)"),
        ]
        if wrong := [f"{name} {getattr(self, name)} must be {rule}" for name, fine, rule in limits if not fine]:
            raise UserError("; ".join(wrong))

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """logits (B, V) -> token ids (B,), every row by these settings."""
        noise = None if self.greedy else torch.empty_like(logits, dtype=torch.float32)
        if noise is not None:
            noise.uniform_(generator=generator)
        return draw(logits, SamplingRows.of([self] * len(logits), logits.device), noise)


class Said:
    """What one sequence has read and said, and what its settings make of that before a token is drawn."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], spared: AbstractSet[int] = frozenset()):
        """spared: tokens that repetition_penalty leaves alone. A chat's prompt holds an end token for each turn.
        Penalised for it, the model would not stop in time."""
        self.sampling, self.spared = sampling, spared
        self.seen = set(prompt) - spared if sampling.repetition_penalty != 1 else set()
        self.counts: Counter[int] = Counter()

    @staticmethod
    def needed(sampling: Sampling) -> bool:
        penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
        return bool(penalised or sampling.logit_bias)

    def add(self, token: int) -> None:
        self.counts[token] += 1
        if self.sampling.repetition_penalty != 1 and token not in self.spared:
            self.seen.add(token)

    def adjust(self, logits: Tensor) -> None:
        """Changes the logits (V,) of the next token, in place."""
        s, new = self.sampling, lambda values: to_device(values, logits.device)
        if self.seen:  # CTRL, arXiv:1909.05858, section 4.1, as Hugging Face applies it to negative scores
            ids = new([token for token in self.seen if token < len(logits)])
            score = logits[ids]
            logits[ids] = torch.where(score > 0, score / s.repetition_penalty, score * s.repetition_penalty)
        if self.counts and (s.presence_penalty or s.frequency_penalty):
            ids, counts = new(list(self.counts)), new(list(self.counts.values()))
            logits[ids] -= s.presence_penalty + s.frequency_penalty * counts
        if s.logit_bias:
            logits[new(list(s.logit_bias))] += new(list(s.logit_bias.values()))


class SamplingRows(NamedTuple):
    """The settings of B rows, each (B, 1). None: no row needs it."""

    temperature: Tensor | None
    greedy: Tensor | None  # (B,) rows that take the likeliest token though others draw
    top_k: Tensor | None
    most: int  # the greatest top_k
    top_p: Tensor | None
    min_p: Tensor | None

    @property
    def kind(self) -> tuple[int | bool, ...]:
        """What decides which operations `draw` takes: the greatest top_k, rounded up, and which settings there are."""
        return 1 << (self.most - 1).bit_length() if self.most else 0, *(part is None for part in self)

    def each(self, change: Callable[[Tensor], Tensor], most: int | None = None) -> SamplingRows:
        """With every tensor changed. most: a greater one."""
        new = lambda part: None if part is None else change(part)
        most = self.most if most is None else most
        return SamplingRows(
            new(self.temperature), new(self.greedy), new(self.top_k), most, new(self.top_p), new(self.min_p)
        )

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device | str = "cpu") -> SamplingRows:
        def column(values: list[float], off: float) -> Tensor | None:
            return None if all(v == off for v in values) else to_device(values, device)[:, None]

        greedy = [s.greedy for s in rows]
        rows = [Sampling(1.0, 1.0) if s.greedy else s for s in rows]  # what they ask for besides has no effect
        return cls(
            column([s.temperature for s in rows], off=1.0),
            to_device(greedy, device) if any(greedy) and not all(greedy) else None,
            column([s.top_k for s in rows], off=0),
            max(s.top_k for s in rows),
            # 1 keeps all, however p adds up
            column([max(s.top_p, LEAST_TOP_P) if s.top_p < 1 else math.inf for s in rows], off=math.inf),
            column([s.min_p for s in rows], off=0.0),
        )


def next_tokens(
    logits: Tensor, rows: SamplingRows, noise: Tensor | None, adjusted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `draw` -> the tokens (B,), and the same again with -1 where the model's logits are not finite and a token says
    nothing. adjusted: the logits to draw from, where penalties and biases have changed them, perhaps to -infinity."""
    logits = logits.float()
    drawn, total = draw(logits if adjusted is None else adjusted, rows, noise), logits.sum(-1)
    return drawn, drawn.masked_fill(total - total != 0, -1)  # infinity - infinity is NaN; isfinite is four kernels


def draw(logits: Tensor, rows: SamplingRows, noise: Tensor | None) -> Tensor:
    """logits (B, V), noise (B, V) drawn evenly from [0, 1) -> token ids (B,). noise None: every row is greedy.

    Each token gets a draw of its own, so the result does not depend on the order of tokens of equal probability. argmin
    of Exponential(1) / p is a draw from p, without the device synchronisation of torch.multinomial.
    """
    logits = logits.float()
    if noise is None:
        return logits.argmax(-1)
    scaled = logits if rows.temperature is None else logits / rows.temperature
    if rows.top_k is not None:
        best = scaled.topk(min(rows.most, scaled.shape[-1])).values  # (B, most)
        least = best.gather(-1, (rows.top_k - 1).clamp(0, best.shape[-1] - 1))
        scaled = scaled.masked_fill((scaled < least) & (rows.top_k > 0), float("-inf"))
    p = scaled.softmax(-1)
    if rows.top_p is not None:
        p = torch.where(p >= _least_kept(p, rows.top_p), p, 0)
    if rows.min_p is not None:
        p = torch.where(p >= rows.min_p * p.amax(-1, keepdim=True), p, 0)
    noise = noise.clamp_min(torch.finfo(noise.dtype).tiny)  # at 0 a token is worth as little as those that were dropped
    drawn = (noise.log() / p).argmax(-1)
    return drawn if rows.greedy is None else torch.where(rows.greedy, logits.argmax(-1), drawn)


def _least_kept(p: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability (B, 1) among the fewest tokens whose sum reaches top_p (arXiv:1904.09751, section
    3.1)."""
    V = p.shape[-1]
    some = V if p.is_cuda else min(LIKELIEST, V)
    best = p.topk(some).values if some < V else p.sort(descending=True).values  # (B, some), falling
    if some < V and bool((best.sum(-1, keepdim=True) < top_p).any()):
        best = p.sort(descending=True).values
    before = best.cumsum(-1) - best
    return torch.where(before < top_p, best, math.inf).amin(-1, keepdim=True)
