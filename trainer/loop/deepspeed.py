"""DeepSpeed's engine as a backend: ZeRO 0-3, and whatever a --deepspeed_config adds (offload, bf16 weights ...).

    deepspeed --num_gpus 2 trainer/train_pretrain.py --zero_stage 2

What an update is stays ours: when micro-batches are summed, what they are divided by, the learning rate, AdamW itself.
DeepSpeed shards it (ZeRO, arXiv:1910.02054): with N processes each keeps 1/N of the moments (stage 1), of the
gradients too (2), of the weights too (3). Clipping and the check for numbers that are not finite are done once: by
its step where gradients are sharded, since only it sees them all; by ours in stage 0.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import Tensor

from common.console import UserError
from trainer.loop.backend import DDP


class DeepSpeed(DDP):
    """Stage 0: its engine, nothing sharded."""

    def __init__(self, device: torch.device, config: dict, timeout: timedelta | None = None):
        super().__init__(device, timeout)
        self.config = config

    def wrap(self, model, optimizers):
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # read when it is imported
        os.environ.setdefault("LOCAL_RANK", "0")  # there was no launcher
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"--backend deepspeed: {error}; pip install deepspeed, or start with torchrun") from None
        deepspeed.logger.setLevel("ERROR")
        # sums between the processes of one machine: gloo has them, without minutes of compiling at the first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super().wrap(model, optimizers)
        (self.optimizer,) = optimizers
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self.config)
        return self.engine

    def _wrapped(self, model):
        return model  # by wrap, once the optimiser is known

    @contextmanager
    def accumulate(self, model, last):
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss, scale):
        self.engine.backward(loss * scale, scale_wrt_gas=False)

    def _move(self, bad):
        # offloaded shards are on the CPU; torch would copy this there without waiting for it
        self.optimizer.found_inf = bad.to(self._moved_on())
        self.engine.step()

    def _moved_on(self) -> torch.device:
        return self.device


class ZeRO(DeepSpeed):
    """Stages 1 to 3: full tensors exist only while somebody looks at them."""

    def backward(self, loss, scale):
        self.engine.optimizer.override_loss_scale(scale)  # multiplied in here, divided out before it clips
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, limit, scale, healthy):
        bad = self.all_reduce_max((~healthy).float())
        self._move(bad)  # clips to the same limit, which is in its config
        norm = torch.tensor(float(self.engine.get_global_grad_norm()), device=self.device)
        skipped = self.engine.optimizer.overflow  # a norm that was not finite, the same on all ranks
        return norm, torch.maximum(bad, torch.full_like(bad, float(skipped)))

    @contextmanager
    def full_weights(self):
        """The first rank's parameters are full and fp32 meanwhile, on the CPU, gathered one at a time: no device ever
        holds them all."""
        full = {p: self._full(p) for p in self.model.parameters()}
        before = {p: p.data for p in full} if self.main else {}
        try:
            for parameter in before:
                parameter.data = full[parameter]
            yield
        finally:
            for parameter, data in before.items():
                parameter.data = data

    def _full(self, parameter: Tensor) -> Tensor | None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        found = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if found is None:  # frozen
            with GatheredParameters([parameter]):
                return parameter.detach().cpu().clone() if self.main else None
        return found.cpu() if self.main else None

    def optimizer_tensors(self):
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        found, shard = {}, self._shards()[0]
        for kind, tensor in self.optimizer.state.get(shard, {}).items():
            for name, parameter in self._trained():
                full = tensor if tensor.dim() == 0 else safe_get_full_optimizer_state(parameter, kind).cpu()
                if self.main:
                    found[f"{name}/{kind}"] = full
        return found

    def load(self, weights, optimizer):
        named = dict(self._trained())
        kinds = {key.rpartition("/")[2]: value for key, value in optimizer.items()}
        for shard in self._shards():
            self.optimizer.state[shard] = {
                kind: like.to(shard.device, copy=True) if like.dim() == 0 else torch.zeros_like(shard)
                for kind, like in kinds.items()
            }
        self._link_states()
        for name, parameter in named.items():
            self._set(parameter, weights[name], None)
            for kind, like in kinds.items():
                if like.dim():
                    self._set(parameter, optimizer[f"{name}/{kind}"], kind)
        self._refresh(named, weights)

    # ---- where stages 1 and 2 keep things; stage 3 differs ----

    def _shards(self) -> list[Tensor]:
        """The fp32 tensors that the optimiser moves: flat pieces of many parameters."""
        return self.engine.optimizer.single_partition_of_fp32_groups

    def _moved_on(self):
        return self._shards()[0].device

    def _link_states(self) -> None:
        """Its own linking, at the first step of the first group of parameters, misses the other groups' states."""
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Tensor, value: Tensor, kind: str | None) -> None:
        """This rank's part of a weight, or of an optimiser's tensor."""
        value = value.to(self.device)
        parameter.set_full_hp_param(value, kind) if kind else parameter.set_full_hp_param(value)

    def _refresh(self, named, weights) -> None:
        """What is computed with follows its fp32 master."""
        self.engine.optimizer.update_lp_params()


class ZeRO3(ZeRO):
    """Weights are sharded too."""

    def _shards(self):
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def _link_states(self):
        pass

    def _set(self, parameter, value, kind):
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel  # of each rank's part; the last one's is filled up
        flat = F.pad(value.to(self.device).flatten(), (0, size * self.world - value.numel()))
        part = flat.narrow(0, size * self.rank, size)
        if kind:
            safe_set_local_optimizer_state(parameter, part, kind)
        else:
            safe_set_local_fp32_param(parameter, part)

    def _refresh(self, named, weights):
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in named.items():
            with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if self.main:
                    parameter.copy_(weights[name])


STAGES = (DeepSpeed, ZeRO, ZeRO, ZeRO3)
