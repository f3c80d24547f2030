"""The machine's own rate of matrix products, which MFU is a share of."""

import torch

from trainer.run import meter


def test_a_gpu_computes_several_products_between_two_waits(monkeypatch):
    """Else the time to start one would count, and the rate would be far too low. A CPU starts in no time."""
    log = []
    monkeypatch.setattr(meter, "wait_for", lambda _: log.append("wait"))
    monkeypatch.setattr(meter.F, "linear", lambda *_: log.append("product"))
    monkeypatch.setattr(meter.time, "perf_counter", iter(range(100)).__next__)  # a second passes between two looks
    for device, at_once in (("cpu", 1), ("meta", 10)):
        log.clear()
        rate = meter.gemm_rate([(4, 2, 3)], torch.float32, torch.device(device), repeats=2)
        assert log == ["product"] + 2 * ["wait", *["product"] * at_once, "wait"] and rate == 2 * 4 * 2 * 3 * at_once
