"""LoRA: small matrices beside the linear layers of a frozen model are trained (arXiv:2106.09685). The model does not
know about it.

    freeze(model)
    add_lora(model, LoRASettings(rank=8, alpha=16, targets=("attention",)))     # now only A and B have gradients
    with adapter_disabled(model): ...                                           # the model as it was
    merge(model); ...; unmerge(model)                                           # W + scale B A, then exactly W again
    add_lora(model, settings, name="medical"); activate(model, "medical")       # several on one base, one at a time

    y = W x + scale * B A dropout(x)       A (r, in) random, B (out, r) zero: at first y = W x
    scale = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732, eq. 6)

Beside packed weights (model/quant.py) the same: `add_lora` after `quantize_model`.

A layer and its weight keep their names; the matrices are `<layer>.adapters.<name>.A` and `.B`. They are fp32 and cast
to the compute dtype, like all trained weights. Frozen weights can be stored in the compute dtype
(`model.precision.lower_frozen`).
Adapter files: model/adapter.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.console import UserError
from model.layers import Linear
from model.quant import QuantLinear
from model.transformer import CausalLM

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    # ChatGLM's names for the same layers
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "dense_h_to_4h": ("gate_proj", "up_proj"),
    "dense_4h_to_h": ("down_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),  # GLM-4's
}


@dataclass(frozen=True)
class LoRASettings:
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)  # all, a group above, a layer's last name (q_proj) or its whole one
    rslora: bool = False

    def __post_init__(self):
        """Settings from a file may be anything."""
        is_number = {name: type(getattr(self, name)) in (int, float) for name in ("alpha", "dropout")}
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"LoRA's rank must be a whole number from 1 on, not {self.rank!r:.40}")
        if not is_number["alpha"] or not math.isfinite(self.alpha):
            raise UserError(f"LoRA's alpha must be a number, not {self.alpha!r:.40}")
        if not is_number["dropout"] or not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's dropout must be at least 0 and below 1, not {self.dropout!r:.40}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | dict(targets=list(self.targets))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoRASettings:
        return cls(**{**values, "targets": tuple(values["targets"])})


class Adapter(nn.Module):
    def __init__(self, layer: nn.Linear, settings: LoRASettings):
        super().__init__()
        self.scale, self.dropout = settings.scale, settings.dropout
        A = torch.empty(settings.rank, layer.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in)), as peft does; the same on all devices
        device = next(chain(layer.parameters(), layer.buffers())).device  # a packed weight is no parameter
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, settings.rank, dtype=torch.float32, device=device))

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y (N, out) + scale B A x of x (N, in), in place: the sum is part of the last matrix product."""
        h = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))  # (N, r)
        return y.addmm_(h, (self.B * self.scale).to(x.dtype).T)

    def product(self) -> Tensor:
        """scale B A: what is added to the weight (out, in)."""
        return self.scale * (self.B @ self.A)


class LoRALinear(Linear):
    """Takes the place of a Linear, with the same weight under the same name."""

    def __init__(self, layer: Linear):
        nn.Module.__init__(self)  # Linear's would allocate another weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.unmerged: Tensor | None = None  # the weight as it was, while the active adapter is merged into it
        self.train(layer.training)

    @property
    def merged(self) -> bool:
        return self.unmerged is not None

    def merge_(self) -> None:
        """Adds the active adapter to the weight, which is kept."""
        assert self.active is not None
        self.unmerged = self.weight.data
        merged = self.weight.float() + self.adapter(self.active).product()
        self.weight.data = merged.to(self.weight.dtype)

    def unmerge_(self) -> None:
        assert self.unmerged is not None
        self.weight.data, self.unmerged = self.unmerged, None

    def plain(self) -> Linear:
        """The layer without adapters, with the weight it has now."""
        with torch.device("meta"):
            plain = Linear(self.in_features, self.out_features, bias=self.bias is not None)
        plain.weight, plain.bias = self.weight, self.bias
        return plain

    def forward(self, x: Tensor) -> Tensor:
        if self.active is None or self.merged:
            return super().forward(x)
        flat = x.reshape(-1, self.in_features)
        return self.adapter(self.active).add_to(super().forward(flat), flat).view(*x.shape[:-1], -1)

    def adapter(self, name: str) -> Adapter:
        return self.adapters[name]  # pyright: ignore[reportReturnType] (a ModuleDict is not generic)


class QuantLoRALinear(LoRALinear, QuantLinear):
    """An adapter beside a packed weight: `LoRALinear.forward` calls `QuantLinear.forward` as its super's.

    Merged, it has a dense weight in bf16, far finer than 4 or 8 bits; the packed one is kept beside it."""

    def __init__(self, layer: QuantLinear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.kind = layer.bits, layer.kind
        self._buffers.update(layer._buffers)
        self.register_parameter("weight", None)
        self.bias = layer.bias
        self.adapters, self.active = nn.ModuleDict(), None
        self.train(layer.training)

    @property
    def merged(self) -> bool:
        return self.weight is not None

    def merge_(self):
        assert self.active is not None
        dense = self.dequantize() + self.adapter(self.active).product()
        self.weight = nn.Parameter(dense.to(torch.bfloat16), requires_grad=False)

    def unmerge_(self):
        self.register_parameter("weight", None)

    def plain(self):
        if self.merged:
            return super().plain()
        layer = QuantLinear(self.in_features, self.out_features, self.bits, device="meta")
        layer._buffers.update(self._buffers)
        layer.bias = self.bias
        return layer

    def forward(self, x):
        return Linear.forward(self, x) if self.merged else super().forward(x)


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """What can be adapted, by name. Not the router, whose weight is used without calling the layer; not the experts,
    which are stacked parameters; not the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"}


def find_targets(model: CausalLM, targets: tuple[str, ...]) -> list[str]:
    """The names of the layers that `targets` select, in the model's order. A target that selects none is an error."""
    layers = linear_layers(model)
    found, unknown = set(), []
    for target in targets:
        last = GROUPS.get(target, (target,))
        here = [n for n in layers if target == "all" or n == target or n.rpartition(".")[2] in last]
        unknown += [] if here else [target]
        found.update(here)
    if unknown or not found:
        names = sorted({name.rpartition(".")[2] for name in layers})
        why = f"; this model has {', '.join(names)}, or say attention, mlp or all"
        if "lm_head" in unknown:
            why += "; the head is left as it is, since it may be the embedding too"
        if model.config.num_experts:
            why += "; its experts are stacked parameters and cannot be adapted"
        raise UserError(f"--lora_targets {', '.join(unknown)}: no such linear layer{why}")
    return [name for name in layers if name in found]


def add_lora(
    model: CausalLM, settings: LoRASettings, name: str = "default", layers: list[str] | None = None
) -> list[str]:
    """Puts an adapter beside each target (or the layers given by whole name) and activates it -> the layers' names."""
    names = find_targets(model, settings.targets) if layers is None else layers
    known = linear_layers(model)
    for path in names:
        layer = known[path]
        if not isinstance(layer, LoRALinear):
            layer = QuantLoRALinear(layer) if isinstance(layer, QuantLinear) else LoRALinear(layer)
            model.set_submodule(path, layer)
        if name in layer.adapters:
            raise UserError(f"there is an adapter called {name!r} already")
        layer.adapters[name] = Adapter(layer, settings).train(layer.training)
    activate(model, name)
    return names


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def activate(model: nn.Module, name: str | None) -> None:
    """Computes with the adapter of this name from now on; None: with none."""
    layers = adapted(model).values()
    if name is not None and not any(name in layer.adapters for layer in layers):
        known = sorted({known for layer in layers for known in layer.adapters})
        raise UserError(f"no adapter called {name!r}; there are {', '.join(known) or 'none'}")
    if any(layer.merged for layer in layers):
        raise UserError("an adapter is merged into the weights; unmerge it first")
    for layer in layers:
        layer.active = name if name is not None and name in layer.adapters else None


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Computes without the adapter: the model as it was, as DPO's reference for instance."""
    layers = adapted(model).values()
    if any(layer.merged for layer in layers):
        raise UserError("an adapter is merged into the weights; unmerge it first")
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = None
        yield
    finally:
        for layer, name in zip(layers, before):
            layer.active = name


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds the active adapter to the weights, so that it costs no time. A second call changes nothing."""
    for layer in adapted(model).values():
        if layer.active is not None and not layer.merged:
            layer.merge_()


def unmerge(model: nn.Module) -> None:
    """Puts the original weights back. They were kept: subtracting would leave rounding errors."""
    for layer in adapted(model).values():
        if layer.merged:
            layer.unmerge_()


def remove_lora(model: nn.Module) -> None:
    """Plain linear layers again, with the weights they have now (so merge first to keep what was learned)."""
    for path, layer in adapted(model).items():
        model.set_submodule(path, layer.plain().train(layer.training))


# ---- what is frozen, and what is learned


def freeze(model: nn.Module) -> None:
    """No parameter of the model is trained; adapters added afterwards are."""
    model.requires_grad_(False)


def lora_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """{"<layer>.A": (r, in), "<layer>.B": (out, r)}"""
    return {
        f"{path}.{matrix}": getattr(layer.adapter(name), matrix).detach().cpu().clone()
        for path, layer in adapted(model).items()
        if name in layer.adapters
        for matrix in "AB"
    }
