"""What the steps since the last log add up to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from trainer.backend import Backend


@dataclass
class Window:
    since: float = field(default_factory=time.perf_counter)
    units: float = 0.0
    tokens: float = 0.0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, metrics: dict[str, torch.Tensor], units: float, tokens: float, bad: torch.Tensor) -> None:
        """A bad step counts for nothing."""
        self.units, self.tokens = self.units + units * (1 - bad), self.tokens + tokens
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(bad > 0, 0, value)

    def read(self, backend: Backend) -> dict[str, float]:
        """Means over all ranks' units, and trained tokens per second."""
        totals, units = backend.sum(*map(float, self.sums.values())), float(self.units)
        speed = self.tokens / max(time.perf_counter() - self.since, 1e-9)
        means = {name: total / units for name, total in zip(self.sums, totals)} if units else {}
        return means | dict(tokens_per_second=speed)
