"""The loss over the validation data."""

from __future__ import annotations

import math

import numpy as np
import torch

from common.console import Progress, UserError, note, ran_out_of_memory
from dataset.batches.loader import Loader
from model.transformer import CausalLM
from trainer.loop.backend import Backend
from trainer.loop.interrupts import Signals
from trainer.losses.base import Objective


class NoMemory(UserError):
    """Raised by all ranks together, so that they can still save."""


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

    NoMemory on all ranks if there is too little on one. (Not with ZeRO-3: the others wait for its weights meanwhile.)
    """
    model.eval()
    found: dict[str, list[torch.Tensor]] = {}  # read at the end: reading a number waits for the device
    units, text_bytes, overdue, full = 0, 0, 0.0, 0.0
    progress = Progress("validating", loader.steps_per_epoch, " batches") if backend.main else None
    for _, batches in loader.prefetch(0, loader.steps_per_epoch):
        overdue, full = backend.sum(received.overdue, full)
        if overdue or full:
            break
        if progress:
            progress.advance(1)
        try:
            for batch in batches:
                _, metrics = objective(model, batch.to(backend.device))
                for name, value in metrics.items():
                    found.setdefault(name, []).append(value)
                units += objective.count(batch)
                targets = batch.targets.numpy()
                text_bytes += int(token_bytes[targets[targets >= 0]].sum())
        except (RuntimeError, MemoryError) as error:
            if backend.gathers or not ran_out_of_memory(error):
                raise
            full = 1.0
    if progress:
        progress.close()
    model.train()
    if overdue:
        if backend.main:
            note("the validation is broken off: it would go on for long after the signal")
        return {}
    (full,) = backend.sum(full)
    if full:
        raise NoMemory(
            "out of memory in the validation, which computes --batch_size rows at once: a smaller one with more "
            "--accumulation_steps trains the same; continue with --from_resume auto"
        )
    sums = [sum(torch.stack(values).tolist()) for values in found.values()]
    units, text_bytes, *totals = backend.sum(units, text_bytes, *sums)
    means = {f"val_{name}": total / max(units, 1) for name, total in zip(found, totals)}
    if objective.per_token:
        means["val_bpb"] = means["val_loss"] * units / math.log(2) / max(text_bytes, 1)
    return means
