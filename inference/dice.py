"""Draws the next tokens of sequences, of which each has its own settings and its own random numbers.

Letters: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

import torch
from torch import Tensor

from inference.drawn import Drawn, LogProbs
from inference.request import Sequence
from inference.sampling import SamplingRows, next_tokens


class Dice:
    def __init__(self, device: torch.device):
        self.device = device
        self.generator = torch.Generator(device)  # for those without a seed
        self.generator.seed()
        self.last: tuple[list[Sequence], SamplingRows] | None = None

    def draw(self, sequences: list[Sequence], logits: Tensor) -> Drawn:
        """The next token of each sequence, from logits (B, V)."""
        adjusted = logits.float()
        if any(sequence.said for sequence in sequences):
            adjusted = adjusted.clone() if adjusted is logits else adjusted
            for row, sequence in enumerate(sequences):
                if sequence.said:
                    sequence.said.adjust(adjusted[row])
        noise = torch.empty_like(adjusted) if is_random(sequences) else None
        if noise is not None:
            self.fill(sequences, noise)
        return drawn_of(sequences, *next_tokens(logits, self.settings(sequences), noise, adjusted), logits)

    def settings(self, sequences: list[Sequence]) -> SamplingRows:
        """The same object as long as the sequences are the same."""
        if self.last is None or sequences != self.last[0]:
            self.last = sequences, SamplingRows.of([s.request.sampling for s in sequences], self.device)
        return self.last[1]

    def fill(self, sequences: Listed[Sequence], noise: Tensor) -> None:
        """Writes random numbers from [0, 1) into noise (B, V), for each sequence by its seed."""
        if any(s.generator is None and not s.request.sampling.greedy for s in sequences):
            noise.uniform_(generator=self.generator)
        for row, sequence in enumerate(sequences):
            if sequence.generator is not None:
                noise[row].uniform_(generator=sequence.generator)


def is_random(sequences: Listed[Sequence]) -> bool:
    return not all(sequence.request.sampling.greedy for sequence in sequences)


def drawn_of(sequences: list[Sequence], tokens: Tensor, told: Tensor, logits: Tensor) -> Drawn:
    """With the log-probabilities that the sequences ask for. logits: the model's own (B, V)."""
    most = max((s.request.logprobs for s in sequences if s.request.logprobs is not None), default=None)
    return Drawn(sequences, tokens, told, None if most is None else LogProbs.of(logits, tokens, most))
