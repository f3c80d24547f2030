"""The loss over the validation data."""

from __future__ import annotations

import math

import numpy as np
import torch

from common.console import Progress, note
from dataset.batches.loader import Loader
from model.transformer import CausalLM
from trainer.loop.backend import Backend
from trainer.loop.interrupts import Signals
from trainer.losses.base import Objective


@torch.no_grad()
def validate(
    model: CausalLM,
    loader: Loader,
    objective: Objective,
    backend: Backend,
    token_bytes: np.ndarray,
    received: Signals = Signals(),  # noqa: B008
) -> dict[str, float]:
    """{"val_<metric>": mean over the units of all ranks} for each of the objective's metrics.

    Where the units are tokens there is also "val_bpb", bits per byte: it can be compared across tokenizers.

    token_bytes  (vocab_size,) how many bytes of text each token stands for
    received     if they are overdue on any rank, all ranks leave, with {}
    """
    model.eval()
    found: dict[str, list[torch.Tensor]] = {}  # read at the end: reading a number waits for the device
    units, text_bytes, overdue = 0, 0, 0.0
    progress = Progress("validating", loader.steps_per_epoch, " batches") if backend.main else None
    for _, batches in loader.prefetch(0, loader.steps_per_epoch):
        (overdue,) = backend.sum(received.overdue)
        if overdue:
            break
        if progress:
            progress.advance(1)
        for batch in batches:
            _, metrics = objective(model, batch.to(backend.device))
            for name, value in metrics.items():
                found.setdefault(name, []).append(value)
            units += objective.count(batch)
            targets = batch.targets.numpy()
            text_bytes += int(token_bytes[targets[targets >= 0]].sum())
    if progress:
        progress.close()
    model.train()
    if overdue:
        if backend.main:
            note("the validation is broken off: it would go on for long after the signal")
        return {}
    sums = [sum(torch.stack(values).tolist()) for values in found.values()]
    units, text_bytes, *totals = backend.sum(units, text_bytes, *sums)
    means = {f"val_{name}": total / max(units, 1) for name, total in zip(found, totals)}
    if objective.per_token:
        means["val_bpb"] = means["val_loss"] * units / math.log(2) / max(text_bytes, 1)
    return means
