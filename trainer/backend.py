"""How many processes there are, and what they have to agree on.

    python train_x.py                           one process; everything here does nothing
    torchrun --nproc_per_node 2 train_x.py      one process a device, gradients averaged by DistributedDataParallel

Numbers that steer the loop (how many tokens a step has, whether somebody pressed Ctrl-C) are exchanged between the
hosts' processors, by gloo, so that no GPU is waited for.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.device import pick_device


class Backend:
    """One process."""

    def __init__(self, device: torch.device):
        self.rank, self.world, self.device = 0, 1, device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def accumulate(self, model: nn.Module, last: bool):
        """Context for one micro-batch: gradients travel with the last one only."""
        return nullcontext()

    def sum(self, *numbers: float) -> list[float]:
        """Each number added up over all ranks, in fp64, without touching the device."""
        return list(numbers)

    def worst(self, flag: Tensor) -> Tensor:
        """The largest of all ranks' values of a tensor on the device."""
        return flag

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """One CPU tensor of every rank, in order of rank."""
        return [tensor]

    def tell(self, texts: list[str]) -> list[str]:
        """The first rank's, to all."""
        return texts

    def barrier(self) -> None:
        pass


class DDP(Backend):
    """One process per device."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.host = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    def wrap(self, model: nn.Module) -> nn.Module:
        on_device = dict(device_ids=[self.device.index]) if self.device.type == "cuda" else {}
        return nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, **on_device
        )

    def accumulate(self, model, last):
        return nullcontext() if last else model.no_sync()

    def sum(self, *numbers):
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.host)
        return tensor.tolist()

    def worst(self, flag):
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def gather(self, tensor):
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor, group=self.host)
        return parts

    def tell(self, texts):
        dist.broadcast_object_list(texts, group=self.host)
        return texts

    def barrier(self):
        dist.barrier(group=self.host)


@contextmanager
def start(device: str = "auto", timeout: float = 1800):
    """The backend that the launcher asked for, for as long as the block lasts."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    picked = pick_device(device, local_rank)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Backend(picked)
        return
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    dist.init_process_group(
        {"cuda": "nccl", "npu": "hccl"}.get(picked.type, "gloo"), timeout=timedelta(seconds=timeout)
    )
    try:
        yield DDP(picked)
    finally:
        dist.destroy_process_group()
