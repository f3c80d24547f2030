"""How many processes there are, and what they have to agree on.

    python train_x.py                           one process
    torchrun --nproc_per_node 2 train_x.py      one process a device, gradients averaged by DistributedDataParallel
    deepspeed --num_gpus 2 train_x.py           DeepSpeed's engine, which shards what it can (trainer/loop/deepspeed.py)

Numbers that steer the loop (the units of a step, whether a signal was received) are exchanged between the CPUs, by
gloo: that does not wait for a GPU.
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
    """One process. Subclasses differ in how an update is computed, and in which rank holds which tensors."""

    gathers = False  # whether a forward pass needs the other ranks

    def __init__(self, device: torch.device):
        self.rank, self.world, self.device = 0, 1, device
        if device.type == "cpu":
            keep_freed_memory()

    @property
    def main(self) -> bool:
        return self.rank == 0

    # ---- an optimiser step ----

    def wrap(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> nn.Module:
        """-> the module to call instead of the model from now on. Called once."""
        self.model, self.optimizers = model, optimizers
        return self._wrapped(model)

    def _wrapped(self, model: nn.Module) -> nn.Module:
        return model

    def accumulate(self, model: nn.Module, last: bool):
        """Context for one micro-batch. Ranks exchange gradients only after the last one of a step."""
        return nullcontext()

    def backward(self, loss: Tensor, scale: float) -> None:
        """Adds the gradient of loss * scale, averaged over the ranks."""
        (loss * scale).backward()

    def update(self, max_norm: float, scale: float, loss_is_finite: Tensor) -> tuple[Tensor, Tensor]:
        """Divides gradients by `scale`, clips and checks them, and moves the weights -> (norm before clipping, bad).

        bad is 1.0 if anything on any rank was not finite, and then no weight moves; else it is 0.0. Both are scalars on
        the device.
        """
        norm, bad = clip_and_check([p for _, p in self._trained()], max_norm, scale, loss_is_finite)
        bad = self.all_reduce_max(bad)
        self._move(bad)
        return norm, bad

    def _move(self, bad: Tensor) -> None:
        # torch's fused AdamW does not read found_inf on Apple's GPUs (2.13), so there the program has to wait and ask
        skip = self.device.type == "mps" and bool(bad)
        for optimizer in self.optimizers:
            optimizer.found_inf = bad  # if it is 1, torch's fused optimisers and our Muon change nothing
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    # ---- full tensors, also where ranks hold parts of them ----

    def full_weights(self):
        """Context in which rank 0's model holds full fp32 weights. All ranks have to enter it."""
        return nullcontext()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """{"<parameter>/<kind>": full tensor}, complete on rank 0 at least. All ranks have to call it."""
        return resume.optimizer_tensors(self.model, self.optimizers)

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Sets weights and optimiser state from full tensors, named as above; frozen weights are not among them."""
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(weights[name])
        resume.restore_optimizers(self.model, self.optimizers, optimizer)

    # ---- communication ----

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all ranks, in fp64, on the CPU."""
        return list(numbers)

    def all_reduce_max(self, flag: Tensor) -> Tensor:
        """Element-wise maximum over all ranks, of a tensor on the device."""
        return flag

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The CPU tensors of all ranks, in order of rank; they have to be of one shape."""
        return [tensor]

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank; anything that can be pickled."""
        return [value]

    def broadcast(self, texts: list[str]) -> list[str]:
        """Rank 0's texts, on all ranks."""
        return texts

    def barrier(self) -> None:
        pass


class DDP(Backend):
    """One process per device; DistributedDataParallel averages the gradients."""

    def __init__(self, device: torch.device, timeout: timedelta | None = None):
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.host = dist.new_group(backend="gloo", timeout=timeout) if dist.get_backend() != "gloo" else None

    def _wrapped(self, model):
        on_device = dict(device_ids=[self.device.index]) if self.device.type == "cuda" else {}
        wrapper = nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # torch 2.13 warns about the old name
        options = {"forward_sync_buffers" if newer else "broadcast_buffers": False}  # our buffers never change
        # Buckets are exchanged while the rest of the backward pass goes on. static_graph would add nothing, since every
        # parameter is used in every step, and torch's does not survive a first micro-batch under no_sync (torch 2.13).
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
