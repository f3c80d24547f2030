"""What a run prints before its first step."""

from __future__ import annotations

import torch

from common.options import describe


def announce(engine, notice: str) -> None:
    """notice: why the precision is not the one asked for, or an empty text."""
    say, model, config = engine.logger.print, engine.model, engine.config
    say(describe(engine.job.config))
    active = f" ({model.num_parameters(active=True):,} active)" if model.config.num_experts else ""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = model.num_parameters()
    say(f"model: {total:,} parameters{active}, {trainable:,} trained ({trainable / total:.2%})")
    for line in (*engine.job.notes, *engine.job.data.notes, notice):
        if line:
            say(line)
    dtype = str(engine.dtype).removeprefix("torch.")
    ranks = f", {engine.backend.world} processes" if engine.backend.world > 1 else ""
    say(f"device: {engine.backend.device}, {dtype}, {torch.get_num_threads()} threads{ranks}")
    say(f"data: {engine.loader.describe()}; {engine.total:,} steps in all")
    if engine.logger.reference:
        say(engine.logger.reference.describe())
    if config.warmup_steps >= max(engine.total, 1):
        say(
            f"warning: --warmup_steps {config.warmup_steps:g} is not over in {engine.total:,} steps: the rate "
            f"stays below {config.learning_rate:g}"
        )
