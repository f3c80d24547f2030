"""Stored tensors -> a model, one tensor at a time.

The model is made on `meta`, where it has shapes and no numbers. Each tensor is then read into its place, converted or
quantised on the way. So the most that is in memory is the model as it will be, and one layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from common.console import UserError
from model.config import ModelConfig
from model.precision import lower_frozen
from model.quant import quantize_model, quantized
from model.tensor_files import Place, StoredTensors
from model.transformer import CausalLM, equal_weights

READERS = min(4, os.cpu_count() or 1)  # tensors that are read at the same time
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    source: Path | str,
    *,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    device: torch.device | str = "cpu",
) -> CausalLM:
    """Strictly: a missing, unknown or misshapen tensor is an error that says which, as are NaN and infinity.

    source  the file or directory, for messages
    dtype   the model is frozen, and its weights are kept in this one, as `lower_frozen` does; None: all is fp32
    bits    4 or 8: the linear layers are packed (model/quant.py), and the model is frozen
    """
    stored = state if isinstance(state, StoredTensors) else StoredTensors(state)
    with torch.device("meta"):
        model = CausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if problems := _problems(config, shapes, stored):
        raise UserError(f"{source}: these weights do not fit the architecture: {'; '.join(problems)}")
    if bits:
        quantize_model(model, bits)
    if dtype or bits:
        model.requires_grad_(False)
        lower_frozen(model, dtype or torch.float32)
    # as to_empty, which imports sympy for a second
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    model.reset_rope()
    model.to(device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    packed = {f"{name}.weight": layer for name, layer in quantized(model).items()}
    weights, sizes = model.state_dict(), {name: _bytes(stored.places[name]) for name in packed}
    # one for all: between packed layers, memory of dense ones that are freed would remain in pieces that nothing fits
    dense = torch.empty(max(sizes.values(), default=0), dtype=torch.uint8, device=device)
    for name, layer in packed.items():
        weight = dense[: sizes[name]].view(stored.places[name].dtype).view(shapes[name])
        stored.read_into(name, weight)
        layer.quantize_(weight)
    del dense
    with ThreadPoolExecutor(READERS) as pool:  # one looks through its numbers while another waits for the disk
        others = (name for name in stored if name not in packed)
        list(pool.map(lambda name: stored.read_into(name, weights[name]), others))  # raises the first error
    return model


def _bytes(place: Place | Tensor) -> int:
    return torch.Size(place.shape).numel() * place.dtype.itemsize


def _problems(config: ModelConfig, shapes: dict[str, tuple[int, ...]], stored: StoredTensors) -> list[str]:
    """How tensors differ from those of the architecture, {name: shape}."""
    absent = [name for name in shapes if name not in stored]
    tied = config.tie_word_embeddings and EMBEDDING in shapes
    if tied and len(set(absent) & {EMBEDDING, HEAD}) == 1:  # stored once, under either name
        absent = [name for name in absent if name not in (EMBEDDING, HEAD)]
    unknown = [name for name in stored if name not in shapes]
    found = [f"{what}: {_some(names)}" for what, names in (("missing", absent), ("unknown", unknown)) if names]
    for name in shapes.keys() & stored.keys():
        place = stored.places[name]
        if tuple(place.shape) != shapes[name]:
            found.append(f"{name} is {tuple(place.shape)}, not {shapes[name]}")
        elif not place.dtype.is_floating_point:
            found.append(f"{name} is of type {str(place.dtype).removeprefix('torch.')}, not floating point")
    if tied and not found and EMBEDDING in stored and HEAD in stored:
        if stored.places[EMBEDDING] is not stored.places[HEAD] and not equal_weights(stored[HEAD], stored[EMBEDDING]):
            found.append(f"{HEAD} differs from {EMBEDDING}, though tie_word_embeddings is true")
    return sorted(found)[:3]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
