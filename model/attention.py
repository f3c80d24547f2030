"""Causal attention with grouped queries: one function, and the kernels it chooses from.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, G = H/K queries that share a key, D head size.

    sdpa      torch's scaled_dot_product_attention: any device, any mask, KV cache
    blocked   for training on CPUs in bf16: batched matrix products over blocks of queries. Block i only multiplies with
              the keys it may see, and the G queries of a group are folded into rows, which keeps the products large.

Which keys a query may see is prepared once per forward as an `AttentionMask`, not once per layer. Packed documents
never see each other; a token sees itself and what stands before it in its document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 4  # of queries: skips 3/8 of the products; more blocks are smaller and slower (measured at T = 512)


class AttentionMask(NamedTuple):
    """In the form the kernel wants. sdpa without a mask: causal if T == S, everything if T == 1."""

    kernel: str  # "sdpa" | "blocked"
    tensor: Tensor | None = None  # (B or 1, 1, T, S): True = visible for `sdpa`, 0 or -inf to be added for `blocked`


def visibility(
    queries: int, keys: int, documents: Tensor | None, like: Tensor, kernel: str, prefixes: Tensor | None = None
) -> AttentionMask:
    """`queries` new tokens after `keys - queries` cached ones; documents (B, S) numbers the document of every key,
    prefixes (B, S) a second document that it sees."""
    if kernel == "sdpa" and documents is None and (queries == keys or queries == 1):
        return AttentionMask("sdpa")
    # is_causal aligns to the top left, which is wrong once there are more keys than queries: spell the mask out
    key = torch.arange(keys, device=like.device)
    mask = key <= key[keys - queries :, None]  # (T, S)
    if documents is not None:
        same = documents[:, None, :] == documents[:, keys - queries :, None]  # (B, T, S)
        if prefixes is not None:
            same = same | (documents[:, None, :] == prefixes[:, keys - queries :, None])
        mask = mask & same
    mask = mask.view(-1, 1, queries, keys)
    if kernel == "blocked":  # adding is fused into the softmax; comparing there took half of its time
        mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, float("-inf"))
    return AttentionMask(kernel, mask)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before positions
    if mask.kernel == "blocked":
        return blocked_attention(q, k, v, mask.tensor).transpose(1, 2)
    H, T = q.shape[1:3]
    causal = mask.tensor is None and T == k.shape[2] and T > 1
    if q.device.type == "cuda" and T > 1:
        # there only flash attention knows groups, and it takes no mask: what is left would keep (B, H, T, S) in fp32
        k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.tensor, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D), mask (B or 1, 1, T, T) of 0 and -inf -> (B, H, T, D)."""
    B, H, T, D = q.shape
    K, G = k.shape[1], H // k.shape[1]
    q = q.reshape(B, K, G, T, D) * D**-0.5
    rows = -(-T // BLOCKS)
    out = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        R = stop - start
        scores = q[:, :, :, start:stop].reshape(B, K, G * R, D) @ k[:, :, :stop].transpose(-1, -2)  # (B, K, G*R, stop)
        scores = scores.view(B, K, G, R, stop) + mask[:, :, None, start:stop, :stop]
        weights = scores.softmax(-1).view(B, K, G * R, stop)  # computed in fp32 inside, kept in the dtype of q
        out.append((weights @ v[:, :, :stop]).view(B, K, G, R, D))
    return torch.cat(out, dim=3).view(B, H, T, D)
