"""How the next token is drawn from the model's logits.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.console import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token; top_k 0 and top_p 1 keep all tokens. seed None: another every time."""

    temperature: float = 0.85
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        limits = [
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 = off)"),
        ]
        if wrong := [f"{name} {getattr(self, name)} must be {rule}" for name, fine, rule in limits if not fine]:
            raise UserError("; ".join(wrong))

    def draw(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """logits (B, V) -> token ids (B,). seen (B, V) bool: the tokens that repetition_penalty applies to."""
        logits = logits.float()
        if seen is not None:  # CTRL, arXiv:1909.05858, section 4.1, as Hugging Face applies it to negative scores
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], float("-inf"))
        if self.top_p < 1:  # the fewest tokens whose probability reaches top_p (arXiv:1904.09751, section 3.1)
            ordered, index = logits.softmax(-1).sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            logits = logits.masked_fill(beyond.gather(-1, index.argsort(-1)), float("-inf"))
        # argmax of p / Exponential(1) is a draw from p, without the device synchronisation of torch.multinomial
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits.softmax(-1) / noise).argmax(-1)
