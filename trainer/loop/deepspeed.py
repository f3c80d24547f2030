"""DeepSpeed's engine as a backend: ZeRO 0-3, and whatever a --deepspeed_config adds (offload, bf16 weights ...).

    deepspeed --num_gpus 2 trainer/train_pretrain.py --zero_stage 2

Our code decides what an update is: which micro-batches are summed, what they are divided by, the learning rate, and
AdamW itself. DeepSpeed shards its tensors (ZeRO, arXiv:1910.02054): each of N processes keeps 1/N of the moments
(stage 1), also of the gradients (2), also of the weights (3). From stage 1 on, DeepSpeed's step clips and checks the
gradients, since no process has all of them; in stage 0 our code does.
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
    """Stage 0: DeepSpeed's engine, with nothing sharded."""

    def __init__(self, device: torch.device, config: dict, timeout: timedelta | None = None):
        super().__init__(device, timeout)
        self.config = config

    def wrap(self, model, optimizers):
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # read when it is imported
        os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher it is not set
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"--backend deepspeed: {error}; pip install deepspeed, or start with torchrun") from None
        deepspeed.logger.setLevel("ERROR")
        # its sums between processes of one machine take minutes to compile at the first start; gloo does the same
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super().wrap(model, optimizers)
        (self.optimizer,) = optimizers
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self.config)
        return self.engine

    def _wrapped(self, model):
        return model  # `wrap` does it, as it needs the optimiser

    @contextmanager
    def accumulate(self, model, last):
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss, scale):
        self.engine.backward(loss * scale, scale_wrt_gas=False)

    def _move(self, bad):
        # offloaded shards are on the CPU: the fused optimiser would read the flag there before its copy has arrived
        self.optimizer.found_inf = bad.to(self._optimizer_device())
        self.engine.step()

    def _optimizer_device(self) -> torch.device:
        return self.device


class ZeRO(DeepSpeed):
    """Stages 1 to 3: full tensors exist only while they are saved or loaded."""

    def backward(self, loss, scale):
        # its backward multiplies by it, its step divides by it before it clips
        self.engine.optimizer.override_loss_scale(scale)
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, max_norm, scale, loss_is_finite):
        bad = self.all_reduce_max((~loss_is_finite).float())
        self._move(bad)  # DeepSpeed clips to the same norm, by `gradient_clipping` in its config
        norm = torch.tensor(float(self.engine.get_global_grad_norm()), device=self.device)
        skipped = self.engine.optimizer.overflow  # True where the norm was not finite; the same on all ranks
        return norm, torch.maximum(bad, torch.full_like(bad, float(skipped)))

    @contextmanager
    def full_weights(self):
        """Meanwhile rank 0's parameters are full, fp32 and on the CPU. They are gathered one at a time, so that no
        device has to hold all of them."""
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

        self._link_optimizer_states()
        found, shard = {}, self._optimizer_shards()[0]
        for kind, tensor in self.optimizer.state.get(shard, {}).items():
            for name, parameter in self._trained():
                full = tensor.clone() if tensor.dim() == 0 else safe_get_full_optimizer_state(parameter, kind).cpu()
                if self.main:
                    found[f"{name}/{kind}"] = full
        return found

    def load(self, weights, optimizer):
        named = dict(self._trained())
        kinds = {key.rpartition("/")[2]: value for key, value in optimizer.items()}
        for shard in self._optimizer_shards():
            self.optimizer.state[shard] = {
                kind: like.to(shard.device, copy=True) if like.dim() == 0 else torch.zeros_like(shard)
                for kind, like in kinds.items()
            }
        self._link_optimizer_states()
        for name, parameter in named.items():
            self._set_part(parameter, weights[name], None)
            for kind, like in kinds.items():
                if like.dim():
                    self._set_part(parameter, optimizer[f"{name}/{kind}"], kind)
        self._update_model_weights(named, weights)

    # ---- where stages 1 and 2 keep their tensors; stage 3 overrides these ----

    def _optimizer_shards(self) -> list[Tensor]:
        """The fp32 tensors that the optimiser updates; each is flat and holds pieces of many parameters."""
        return self.engine.optimizer.single_partition_of_fp32_groups

    def _optimizer_device(self):
        return self._optimizer_shards()[0].device

    def _link_optimizer_states(self) -> None:
        """Lets parameters find their optimiser states. DeepSpeed does so after the first step of the first group of
        parameters, and misses the states of the other groups."""
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_part(self, parameter: Tensor, value: Tensor, kind: str | None) -> None:
        """Sets this rank's part of a weight (kind None) or of an optimiser state, from the full tensor."""
        value = value.to(self.device)
        parameter.set_full_hp_param(value, kind) if kind else parameter.set_full_hp_param(value)

    def _update_model_weights(self, named, weights) -> None:
        """Copies the fp32 master weights to the weights that the model computes with."""
        self.engine.optimizer.update_lp_params()


class ZeRO3(ZeRO):
    """Stage 3: weights are sharded too."""

    gathers = True

    def _optimizer_shards(self):
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def _link_optimizer_states(self):
        pass

    def _set_part(self, parameter, value, kind):
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel  # elements of each rank's part; the last part is padded
        flat = F.pad(value.to(self.device).flatten(), (0, size * self.world - value.numel()))
        part = flat.narrow(0, size * self.rank, size)
        if kind:
            safe_set_local_optimizer_state(parameter, part, kind)
        else:
            safe_set_local_fp32_param(parameter, part)

    def _update_model_weights(self, named, weights):
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in named.items():
            with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if self.main:
                    parameter.copy_(weights[name])


STAGES = (DeepSpeed, ZeRO, ZeRO, ZeRO3)
