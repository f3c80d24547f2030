"""Adapters under Hugging Face's names, where a layer of theirs is several of ours (see `Family.fused`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.console import UserError
from model.config import ModelConfig
from model.interop import chatglm
from model.interop.hf import FAMILIES, GATE_UP, config_to_hf, layer_rows, split_fused


def our_adapter(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's matrices, {"<layer>.A", "<layer>.B"}, under our names. On a fused layer B is cut into rows as the
    weight is, and each of our layers has the whole of A: the sum of the weight and B A stays the same."""
    fused, found = GATE_UP | chatglm.FUSED, {}
    for theirs, tensor in state.items():
        name = chatglm.our_name(theirs) or theirs
        if name.endswith(".B"):
            found |= split_fused(config, fused, name, tensor)
            continue
        layers = next((ours for layer, ours in fused.items() if name.endswith(f".{layer}.A")), None)
        before = name.rsplit(".", 3)[0]
        found |= {f"{before}.{layer}.A": tensor for layer in layers} if layers else {name: tensor}
    return found


def hf_adapter(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, for the family that `config_to_hf` writes. Beside a fused layer the adapters of its parts become one
    of their ranks together: A below A, B a block each. A part without an adapter has zeros."""
    found = dict(state)
    try:
        fused = FAMILIES[config_to_hf(config)["model_type"]].fused
    except UserError:  # transformers has no family for this model
        return found
    for theirs, ours in fused.items():
        ends = tuple(f".{layer}.A" for layer in ours)
        for before in {name.rsplit(".", 3)[0] for name in state if name.endswith(ends)}:
            parts = [f"{before}.{layer}" for layer in ours]
            like = next(found[f"{part}.A"] for part in parts if f"{part}.A" in found)
            A = [found.pop(f"{part}.A", torch.zeros_like(like)) for part in parts]
            B = [found.pop(f"{part}.B", torch.zeros(layer_rows(config, part), len(like))) for part in parts]
            found |= {f"{before}.{theirs}.A": torch.cat(A), f"{before}.{theirs}.B": torch.block_diag(*B)}
    return found
