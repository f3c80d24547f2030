"""What every loss provides. A loss is a sum over its units: tokens, weights or pairs. The engine counts the units of a
whole optimiser step before it starts and divides by them, so the gradient is the same however the step is divided
among micro-batches and processes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from dataset.batches.loader import Batch


class Objective(Protocol):
    per_token: bool  # the metric `loss` is the negative log-likelihood of tokens, so bits per byte follow from it

    def count(self, batch: Batch) -> float:
        """How many units the batch has. Needs the loader's numbers only, no model."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to backpropagate, and metrics (`loss` among them). All are sums over the batch's units."""
        ...
