"""The figures between two logs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from trainer.backend import Backend


@dataclass
class Window:
    """What has been summed up since the last log."""

    since: float = field(default_factory=time.perf_counter)
    units: float = 0.0
    tokens: float = 0.0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, metrics: dict[str, torch.Tensor], units: float, tokens: float) -> None:
        self.units, self.tokens = self.units + units, self.tokens + tokens
        self.sums = {name: self.sums.get(name, 0) + value for name, value in metrics.items()}

    def read(self, backend: Backend) -> dict[str, float]:
        """Means over all ranks' units, and trained tokens per second."""
        totals = backend.sum(*map(float, self.sums.values()))
        speed = self.tokens / max(time.perf_counter() - self.since, 1e-9)
        return {name: total / self.units for name, total in zip(self.sums, totals)} | dict(tokens_per_second=speed)
