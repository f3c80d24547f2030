"""Rotary position embedding, and the ways to stretch it beyond the trained length.

Each pair of numbers (i, i + R/2) of a query or key head is turned by the angle position * frequency_i, so that the
product of a query and a key depends on the distance between them alone (RoFormer, arXiv:2104.09864, eq. 34). The pairs
are laid out as in Hugging Face's Llama ("rotate half"), or as neighbours (2i, 2i + 1) with
`ModelConfig.rope_interleaved` (GLM). R is the size D of a head, or less: with `ModelConfig.rotary_fraction` only the
first R numbers are turned and the others pass through (GPT-NeoX, GLM, Phi).

>>> rope = rope_table(torch.arange(4), of_each_number(inverse_frequencies(config)[0]))          # (4, 1, R) each
>>> apply_rope(q, rope)                                                                         # (B, 4, H, D)
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from model.config import ModelConfig

Rope = tuple[Tensor, ...]  # (cos, sin), as `rope_table` makes them, or (matrix,)


def count_positions(documents: Tensor) -> Tensor:
    """documents (B, T) -> 0, 1, 2, ... restarting where the document's number changes (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float, Tensor | None]:
    """((R,) radians per position of each number that is turned, factor that cos and sin are multiplied with, (R,) of
    the layers with a sliding window if they have their own)."""
    freq, temperature = inverse_frequencies(config)
    local = local_frequencies(config)
    each = lambda of_pairs: of_each_number(of_pairs, config.rope_interleaved)
    return each(freq), temperature, None if local is None else each(local)


def of_each_number(freq: Tensor, interleaved: bool = False) -> Tensor:
    """(R/2,) -> (R,): the frequency of a pair stands at both of its numbers, negative at the first of the two."""
    if interleaved:
        return torch.stack((-freq, freq), dim=-1).flatten()
    return torch.cat((-freq, freq))


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """((R/2,) radians per position in fp32, factor that cos and sin are multiplied with)."""
    dim = config.rotary_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq, 1.0
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":  # positions are squeezed (arXiv:2306.15595)
        return freq / factor, 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(freq, factor, scaling), 1.0
    if scaling["rope_type"] == "minimind2":
        return _minimind2(freq, factor, scaling, config.max_position_embeddings), 1.0
    return _yarn(freq, factor, scaling, config)


def local_frequencies(config: ModelConfig) -> Tensor | None:
    """(R/2,) of the layers with a sliding window, if they have their own (Gemma 3); None: those of all layers."""
    if config.rope_local_theta is None:
        return None
    return inverse_frequencies(replace(config, rope_theta=config.rope_local_theta, rope_scaling=None))[0]


def _llama3(freq: Tensor, factor: float, scaling: dict) -> Tensor:
    """Slow frequencies are divided, fast ones kept, those between blended (Llama 3.1's published rule)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # within the trained length
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * (keep + (1 - keep) / factor)


def _yarn(freq: Tensor, factor: float, scaling: dict, config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN's NTK-by-parts interpolation and attention temperature (arXiv:2309.00071, eqs. 17-22)."""
    trained, dim, half = scaling["original_max_position_embeddings"], config.rotary_dim, len(freq)

    def dimension(turns: float) -> float:  # that makes so many turns within the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow", 1))), dim - 1)
    squeeze = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    temperature = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1.0
    return freq * (1 - squeeze + squeeze / factor), temperature


def _minimind2(freq: Tensor, factor: float, scaling: dict, length: int) -> Tensor:
    """What MiniMind of 2025 calls YaRN: fast frequencies are scaled a little too. Its checkpoints need exactly this."""
    trained, half = scaling["original_max_position_embeddings"], len(freq)
    if length <= trained:
        return freq
    slow = (2 * math.pi / freq > trained).nonzero()
    first_slow = int(slow[0]) if len(slow) else half
    index = torch.arange(half, dtype=torch.float32)
    beta = scaling["beta_slow"] + (scaling["beta_fast"] - scaling["beta_slow"]) * index / max(half - 1, 1)
    return freq * torch.where(index < first_slow, (beta * factor - beta + 1) / (beta * factor), 1 / factor)


def rope_table(
    positions: Tensor, freq: Tensor, temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """positions (..., T), freq (R,) of each number -> cos and sin (..., T, 1, R), computed in fp32: large positions
    need the digits."""
    angles = positions[..., None, None] * freq
    cos, sin = angles.cos(), angles.sin()
    if temperature != 1:
        cos, sin = cos * temperature, sin * temperature
    return cos.to(dtype), sin.to(dtype)


def as_matrix(rope: Rope, config: ModelConfig) -> Rope:
    """cos and sin (B, T, 1, R) -> (B, T, D, D), what they do to a head: `apply_rope` is then one product. That is for
    single tokens on GPUs, where each operation takes longer to start than to compute."""
    cos, _ = rope
    each = torch.eye(config.head_dim, dtype=cos.dtype, device=cos.device).expand(*cos.shape[:2], -1, -1)
    return (apply_rope(each, rope, config.rope_interleaved),)


def apply_rope(x: Tensor, rope: Rope, interleaved: bool = False) -> Tensor:
    """x (B, T, H, D), its first R numbers turned by the angles of cos and sin (B or 1, T, 1, R), or by their matrix.
    interleaved: the pairs are neighbours.

    (a, b) becomes (a cos - b sin, b cos + a sin) = (a, b) cos + (b, a) (-sin, sin).
    """
    if len(rope) == 1:
        return x @ rope[0]
    cos, sin = rope
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :rotated], rope, interleaved), x[..., rotated:]), dim=-1)
    if interleaved:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        swapped = torch.cat((b, a), dim=-1)
    return torch.addcmul(x * cos, swapped, sin)
