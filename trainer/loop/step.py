"""One optimiser update.

    result = optimizer_step(model, batches, objective, backend, grad_clip=1.0, loss_scale=1.0)

The loss is divided once, by the units (trained tokens, say) of all micro-batches of all ranks. They are counted before
anything is computed. So any split of the same examples into micro-batches and ranks gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataset.batches.loader import Batch
from trainer.loop.backend import Backend
from trainer.loop.profiling import unprofiled
from trainer.losses.base import Objective


@dataclass(frozen=True)
class StepResult:
    """What an update was computed from, and what came of it. Its tensors are on the device: reading one waits."""

    batches: list[Batch]  # this rank's micro-batches
    units: float  # of all ranks; what the loss was divided by
    tokens: int  # trained tokens of all ranks
    losses: list[Tensor]  # scalars: the loss of each micro-batch of this rank, summed over its units
    metrics: dict[str, Tensor]  # scalars: summed over the units of this rank; "loss" is among them
    norm: Tensor  # scalar: norm of the gradient before clipping
    bad: Tensor  # scalar: 1.0 if anything on any rank was not finite (then no weight has moved), else 0.0


def optimizer_step(
    model: nn.Module,
    batches: list[Batch],
    objective: Objective,
    backend: Backend,
    *,
    grad_clip: float,
    loss_scale: float,
    part: Callable[[str], None] = unprofiled,
) -> StepResult:
    """Counts, computes the gradient of all micro-batches, clips and checks it, and moves the weights if it is finite.

    model  what `backend.wrap` has returned
    part   is told which part of the step begins
    """
    own_units, own_tokens = sum(map(objective.count, batches)), sum(batch.trained_tokens for batch in batches)
    units, tokens = backend.sum(own_units, own_tokens)
    losses, metrics = [], {}
    for i, batch in enumerate(batches):
        with backend.accumulate(model, last=i == len(batches) - 1):
            part("data to the device")
            there = batch.to(backend.device)
            part("forward")
            loss, of_batch = objective(model, there)
            part("backward")
            backend.backward(loss * (backend.world / units), loss_scale)  # backends average over the ranks
        losses.append(loss.detach())
        for name, value in of_batch.items():
            metrics[name] = metrics[name] + value if name in metrics else value
    part("optimiser")
    norm, bad = backend.update(grad_clip, loss_scale, torch.isfinite(metrics["loss"]))
    return StepResult(batches, units, int(tokens), losses, metrics, norm, bad)
