"""How many processes there are, and what they have to agree on.

    python train_x.py                           one process
    torchrun --nproc_per_node 2 train_x.py      one process a device, gradients averaged by DistributedDataParallel
    deepspeed --num_gpus 2 train_x.py           DeepSpeed's engine, which shards what it can (trainer/loop/deepspeed.py)

Numbers that steer the loop (how many tokens a step has, whether somebody pressed Ctrl-C) are exchanged between the
hosts' processors, by gloo, so that no GPU is waited for.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.precision import keep_freed_memory
from trainer.loop.optim import clip_and_check
from trainer.run import resume


class Backend:
    """One process. The others differ in how an update is computed and where its tensors are."""

    def __init__(self, device: torch.device):
        self.rank, self.world, self.device = 0, 1, device
        if device.type == "cpu":
            keep_freed_memory()

    @property
    def main(self) -> bool:
        return self.rank == 0

    # ---- an optimiser step ----

    def wrap(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> nn.Module:
        """What is called instead of the model from now on."""
        self.model, self.optimizers = model, optimizers
        return self._wrapped(model)

    def _wrapped(self, model: nn.Module) -> nn.Module:
        return model

    def accumulate(self, model: nn.Module, last: bool):
        """Context for one micro-batch: gradients travel with the last one only."""
        return nullcontext()

    def backward(self, loss: Tensor, scale: float) -> None:
        """Adds the gradient of loss x scale, a mean over the ranks."""
        (loss * scale).backward()

    def update(self, limit: float, scale: float, healthy: Tensor) -> tuple[Tensor, Tensor]:
        """Takes `scale` out, clips to `limit`, judges, and moves -> (gradient norm, 1.0 where anything on any rank is
        not finite, and then nothing has moved)."""
        norm, bad = clip_and_check([p for _, p in self._trained()], limit, scale, healthy)
        bad = self.all_reduce_max(bad)
        self._move(bad)
        return norm, bad

    def _move(self, bad: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.found_inf = bad  # torch's fused optimisers, and our Muon, leave all as it is where this is 1
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    # ---- full tensors, whoever holds which part ----

    def full_weights(self):
        """Context in which the first rank's model holds full fp32 weights. All ranks enter it."""
        return nullcontext()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """{"<parameter>/<kind>": full tensor}, at least on the first rank. All ranks take part."""
        return resume.optimizer_tensors(self.model, self.optimizers)

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """The inverse, from the full tensors of what is trained."""
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(weights[name])
        resume.restore_optimizers(self.model, self.optimizers, optimizer)

    # ---- what the processes agree on ----

    def sum(self, *numbers: float) -> list[float]:
        """Each number added up over all ranks, in fp64, without touching the device."""
        return list(numbers)

    def all_reduce_max(self, flag: Tensor) -> Tensor:
        """The largest of all ranks' values of a tensor on the device."""
        return flag

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """One CPU tensor of every rank, in order of rank."""
        return [tensor]

    def gather_objects(self, value: Any) -> list[Any]:
        """One plain value of every rank, in order of rank."""
        return [value]

    def broadcast(self, texts: list[str]) -> list[str]:
        """The first rank's, to all."""
        return texts

    def barrier(self) -> None:
        pass


class DDP(Backend):
    """One process per device."""

    def __init__(self, device: torch.device, timeout: timedelta | None = None):
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.host = dist.new_group(backend="gloo", timeout=timeout) if dist.get_backend() != "gloo" else None

    def _wrapped(self, model):
        on_device = dict(device_ids=[self.device.index]) if self.device.type == "cuda" else {}
        wrapper = nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # torch 2.13, where the other warns
        options = {"forward_sync_buffers" if newer else "broadcast_buffers": False}  # ours never change
        return wrapper(model, gradient_as_bucket_view=True, **options, **on_device)

    def accumulate(self, model, last):
        return nullcontext() if last else model.no_sync()

    def sum(self, *numbers):
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.host)
        return tensor.tolist()

    def all_reduce_max(self, flag):
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def gather(self, tensor):
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor, group=self.host)
        return parts

    def gather_objects(self, value):
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.host)
        return values

    def broadcast(self, texts):
        dist.broadcast_object_list(texts, group=self.host)
        return texts

    def barrier(self):
        dist.barrier(group=self.host)
