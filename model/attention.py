"""Causal attention with grouped queries: one function, and the kernels it chooses from.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, G = H/K queries that share a key, D head size.

    sdpa      torch's scaled_dot_product_attention: any device, any mask, KV cache
    blocked   for training on CPUs in bf16: batched matrix products over blocks of queries. Block i only multiplies with
              the keys it may see, and the G queries of a group are folded into rows, which keeps the products large.

Who may look at whom is prepared once per forward as a `Visibility`, not once per layer. Packed documents never see each
other; a token sees itself and what stands before it in its document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 4  # of queries: skips 3/8 of the products; more blocks are smaller and slower (measured at T = 512)


class Visibility(NamedTuple):
    """In the form the kernel wants. Without documents and mask: plain causal if T == S, everything if T == 1."""

    kernel: str  # "sdpa" | "blocked"
    documents: Tensor | None = None  # (B, T): for `blocked`
    mask: Tensor | None = None  # (B or 1, 1, T, S) bool, True = visible: for `sdpa`


def visibility(queries: int, keys: int, documents: Tensor | None, device: torch.device, kernel: str) -> Visibility:
    """`queries` new tokens after `keys - queries` cached ones; documents (B, S) numbers the document of every key."""
    if kernel == "blocked":
        return Visibility("blocked", documents=documents)
    if documents is None and (queries == keys or queries == 1):
        return Visibility("sdpa")
    # is_causal aligns to the top left, which is wrong once there are more keys than queries: spell the mask out
    key = torch.arange(keys, device=device)
    mask = key <= key[keys - queries :, None]  # (T, S)
    if documents is not None:
        mask = mask & (documents[:, None, :] == documents[:, keys - queries :, None])  # (B, T, S)
    return Visibility("sdpa", mask=mask.view(-1, 1, queries, keys))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, sees: Visibility) -> Tensor:
    """q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before positions
    if sees.kernel == "blocked":
        return blocked_attention(q, k, v, sees.documents).transpose(1, 2)
    causal = sees.mask is None and q.shape[2] == k.shape[2] and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees.mask, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D), documents (B, T) or None -> (B, H, T, D)."""
    B, H, T, D = q.shape
    K, G = k.shape[1], H // k.shape[1]
    q = q.reshape(B, K, G, T, D) * D**-0.5
    position = torch.arange(T, device=q.device)
    rows = -(-T // BLOCKS)
    out = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        R = stop - start
        scores = (q[:, :, :, start:stop].reshape(B, K, G * R, D) @ k[:, :, :stop].transpose(-1, -2)).view(B, K, G, R, stop)
        visible = position[:stop] <= position[start:stop, None]  # (R, stop)
        if documents is not None:
            visible = visible & (documents[:, None, :stop] == documents[:, start:stop, None])  # (B, R, stop)
            visible = visible[:, None, None]
        scores = scores.float().masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)
        out.append((scores.view(B, K, G * R, stop) @ v[:, :, :stop]).view(B, K, G, R, D))
    return torch.cat(out, dim=3).view(B, H, T, D)
