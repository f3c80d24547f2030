"""What a run logs: mean losses, trained tokens per second, and the share of the machine's speed that it uses (MFU).

    meter = Meter(model, torch.bfloat16, device, measure_peak=True)
    meter.go()
    meter.add(metrics, units, tokens, bad, batches)      # after every optimiser step; waits for no device
    meter.read(backend)                             # {"loss": ..., "tokens_per_second": ..., "mfu": 0.41}
    meter.restart()

MFU (Chowdhery et al. 2022, PaLM, appendix B) is the model's FLOPs (model/cost.py) over the machine's. The machine's are
measured, not read off a data sheet: the best rate of matrix products with the shapes of this model.
"""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.cost import step_flops


class Meter:
    """Sums since the last `restart`, and a clock that stands still while a run validates or saves."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, measure_peak: bool):
        self.config: ModelConfig = model.config
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.trained = trained / max(model.num_parameters(), 1)
        width, ffn = self.config.hidden_size, self.config.intermediate_size
        rows = 1024 if device.type == "cpu" else 8192  # fewer do not keep a GPU busy
        words = max(min(rows, 2**26 // self.config.vocab_size), 1024)
        shapes = [(rows, width, ffn), (rows, ffn, width), (words, width, self.config.vocab_size)]
        self.peak = gemm_rate(shapes, dtype, device) if measure_peak else 0.0
        self.restart()

    def restart(self) -> None:
        self.units, self.tokens, self.flops = 0.0, 0.0, 0.0
        self.seconds, self.since = 0.0, None  # seconds before the last start of the clock, and when that was
        self.sums: dict[str, Tensor] = {}

    def pause(self) -> None:
        """Stops the clock, for saving and validating."""
        self.seconds, self.since = self.elapsed(), None

    def go(self) -> None:
        """Starts the clock."""
        self.since = time.perf_counter()

    def elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self.since if self.since is not None else 0.0)

    def add(self, metrics: dict[str, Tensor], units: float, tokens: float, bad: Tensor, batches: list) -> None:
        """metrics are sums of this rank, units and tokens of all ranks. Of a bad step only the time counts."""
        self.units, self.tokens = self.units + units * (1 - bad), self.tokens + tokens
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(bad > 0, 0, value)
        for batch in batches if self.peak else ():
            positions = batch.tokens.numel()
            heads = positions if batch.selected is None else batch.selected.numel()
            self.flops += step_flops(self.config, positions, batch.tokens.shape[1], heads, self.trained)

    def gather(self, backend) -> Tensor:
        """(ranks, 4 + sums), for a resume state: a continued run logs what an uninterrupted one does."""
        own = [float(self.units), self.tokens, self.flops, self.elapsed(), *map(float, self.sums.values())]
        return torch.stack(backend.gather(torch.tensor(own, dtype=torch.float64)))

    def restore(self, names: list[str], everyone: Tensor, backend) -> None:
        """The inverse of `gather`. If the number of processes has changed, the first rank takes all."""
        if everyone.shape[1] == 2 + len(names):  # a state from before FLOPs and time were saved
            everyone = torch.cat([everyone[:, :2], torch.zeros(len(everyone), 2), everyone[:, 2:]], 1)
        same = len(everyone) == backend.world
        own = everyone[backend.rank] if same else everyone.sum(0) * backend.main
        self.units, self.tokens, _, self.seconds = everyone[0, :4].tolist()
        self.flops = float(own[2] if same else everyone[:, 2].sum() / backend.world)
        self.sums = {name: value.float().to(backend.device) for name, value in zip(names, own[4:])}

    def read(self, backend) -> dict[str, float]:
        """Means over the units of all ranks, trained tokens per second of all ranks, MFU of this rank."""
        totals, units = backend.sum(*map(float, self.sums.values())), float(self.units)
        seconds = max(self.elapsed(), 1e-9)
        figures = {name: total / units for name, total in zip(self.sums, totals)} if units else {}
        figures["tokens_per_second"] = self.tokens / seconds
        return figures | ({"mfu": self.flops / seconds / self.peak} if self.peak else {})


def gemm_rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device, repeats: int = 3) -> float:
    """The best FLOP/s of F.linear at any of the shapes (rows, in, out).

    A GPU gets several products at once: to start one and to wait for it takes as long as to compute a small one.
    """
    best, at_once = 0.0, 1 if device.type == "cpu" else 10
    for rows, inner, outer in shapes:
        x, w = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, outer))
        product = partial(F.linear, x, w)
        product()
        for _ in range(repeats):
            wait_for(device)
            begin = time.perf_counter()
            for _ in range(at_once):
                product()
            wait_for(device)
            best = max(best, 2 * rows * inner * outer * at_once / (time.perf_counter() - begin))
    return best


def wait_for(device: torch.device) -> None:
    """Until everything queued on the device is computed."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
