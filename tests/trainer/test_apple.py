"""What Apple's GPUs (mps) do differently, played on a CPU: there is no Mac here, and nobody has run Sparrow on one."""

import pytest
import torch
from torch import nn

from model.packed import TABLES
from trainer.loop.backend import Backend
from trainer.run.plan import forget_peak

MPS = torch.device("mps")


def test_a_bad_step_leaves_the_weights_alone(monkeypatch):
    """torch's fused AdamW gets `found_inf` there and does not read it (torch 2.13): NaN went into the weights."""
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *lists, **rest: kernel(*lists, **rest | dict(found_inf=None)))
    model = nn.Linear(4, 4)
    backend = Backend(torch.device("cpu"))
    backend.device = MPS
    backend.wrap(model, [torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)])
    before = model.weight.clone()
    for value, moved in ((torch.nan, False), (1.0, True)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        _, bad = backend.update(1.0, 1.0, torch.tensor(True))
        assert bool(bad) is not moved and model.weight.grad is None
        assert torch.isfinite(model.weight).all() and bool((model.weight != before).all()) is moved


def test_no_table_has_64_bit_floats():
    """There are none on that device: NF4 weights could be moved there, and not be multiplied."""
    assert all(table.dtype != torch.float64 for table in TABLES.values())


@pytest.mark.parametrize("device", [MPS, torch.device("cpu")])
def test_the_peak_of_memory_is_not_asked_for(device, monkeypatch):
    """torch.accelerator's functions about memory are an internal error there, so that --plan ended with a traceback
    (https://github.com/pytorch/pytorch/issues/186430)."""

    def refuse(*_):
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", refuse)
    forget_peak(device)
