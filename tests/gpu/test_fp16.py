"""What a card without bf16 computes, on the CPU: fp16 with a loss scale, and experts in blocks."""

import pytest
import torch

from model import moe
from tests.helpers.rows import write_sft
from tests.helpers.runs import sft_engine
from trainer.loop import engine as engine_module


def follow(engine, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        engine._set_learning_rate()
        result = engine.train_step(engine.loader.batches(step))
        engine._record(result)
        assert engine.watch.check()
        losses.append(float(result.metrics["loss"]) / result.units)
    return losses


def test_a_scaled_loss_trains_the_same(tmp_path, monkeypatch):
    """A mixture of experts. At a scale of 2^14 the losses are those of fp32. A gradient that overflows leaves every
    weight as it was and halves the scale, and the next step is a good one again."""
    write_sft(tmp_path / "sft.jsonl")
    options = dict(max_steps=8, warmup_steps=0)
    expected = follow(sft_engine(tmp_path, 8, 1, **options), 6)
    used, blocks = [], moe.linear_in_blocks
    monkeypatch.setattr(moe, "grouped_linear", lambda *given: used.append(1) or blocks(*given))
    monkeypatch.setattr(engine_module, "pick_dtype", lambda *_: (torch.float16, ""))
    engine = sft_engine(tmp_path, 8, 1, **options)
    assert engine.watch.scale == 2.0**14
    losses = follow(engine, 5)
    assert losses == pytest.approx(expected[:5], rel=0.01) and losses[-1] < 0.95 * losses[0]
    assert used
    before = [parameter.detach().clone() for parameter in engine.model.parameters()]
    engine.watch.scale = 2.0**60
    engine._record(engine.train_step(engine.loader.batches(5)))
    assert engine.watch.check() and engine.watch.scale == 2.0**59
    assert all(torch.equal(p, old) for p, old in zip(engine.model.parameters(), before))
    engine.watch.scale = 2.0**14
    engine._record(engine.train_step(engine.loader.batches(5)))
    assert engine.watch.check() and engine.watch.scale == 2.0**14
    assert not all(torch.equal(p, old) for p, old in zip(engine.model.parameters(), before))
