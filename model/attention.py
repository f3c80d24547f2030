"""Causal attention with grouped queries: one function, and the kernels it chooses from.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, G = H/K queries that share a key, D head size.

    sdpa      torch's scaled_dot_product_attention: any device, any mask, KV cache
    blocked   for training on CPUs in bf16: batched matrix products over blocks of queries. Block i only multiplies with
              the keys it may see, and the G queries of a group are folded into rows, which keeps the products large.

Which keys a query may see is prepared before the first layer as an `AttentionMask`, once for all layers with the same
window. A query sees itself and what stands before it in its own document, with a sliding window only the nearest
`window` of these. Documents packed into one row never see each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 4  # of queries: skips 3/8 of the products; more blocks are smaller and slower (measured at T = 512)


class AttentionMask(NamedTuple):
    """Which keys a query sees, in the form the kernel wants. sdpa without a tensor: causal if T == S, all if T == 1."""

    kernel: str  # "sdpa" | "blocked"
    tensor: Tensor | None = None  # (B or 1, 1, T, S): True = visible for `sdpa`, 0 or -inf to be added for `blocked`
    reach: int | None = None  # no query sees a key that stands this many places before it, or more; None: unknown


def build_mask(
    queries: int,
    positions: Tensor,
    documents: Tensor | None,
    like: Tensor,
    kernel: str,
    prefixes: Tensor | None = None,
    window: int | None = None,
) -> AttentionMask:
    """The mask of the last `queries` = T of S keys; the S - T keys before them come from a cache.

    positions (B or 1, S): of each key in its document. documents (B, S): the number of each key's document.
    prefixes (B, S): the number of a second document that a query at this place sees too.
    window: a query sees the keys at distances 0 ... window - 1, as in Hugging Face's models. The distance is that of
        positions, since an answer may stand in its row far behind the prompt that it continues (`prefixes`).
    like: a tensor with the dtype and device of the mask.
    """
    keys = positions.shape[1]
    past = keys - queries
    if window is not None and window >= keys:
        window = None  # everything is near
    if kernel == "sdpa" and documents is None and window is None and (past == 0 or queries == 1):
        return AttentionMask("sdpa")
    # is_causal aligns to the top left, which is wrong once there are more keys than queries: spell the mask out
    key = torch.arange(keys, device=like.device)
    mask = key <= key[past:, None]  # (T, S)
    if documents is not None:
        same = documents[:, None, :] == documents[:, past:, None]  # (B, T, S)
        if prefixes is not None:
            same = same | (documents[:, None, :] == prefixes[:, past:, None])
        mask = mask & same
    if window is not None:
        mask = mask & (positions[:, past:, None] - positions[:, None, :] < window)
    mask = mask.view(-1, 1, queries, keys)
    if kernel == "blocked":  # adding is fused into the softmax; comparing there took half of its time
        mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, float("-inf"))
    return AttentionMask(kernel, mask, window if prefixes is None else None)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before positions
    if mask.kernel == "blocked":
        return blocked_attention(q, k, v, mask).transpose(1, 2)
    H, T = q.shape[1:3]
    if T == 1:  # the G queries of a group take the place of positions: the keys are read once, not G times
        out = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[-1]), k, v, mask.tensor)
        return out.reshape(q.shape).transpose(1, 2)
    causal = mask.tensor is None and T == k.shape[2]
    if q.device.type == "cuda":
        # Only flash attention shares keys between queries there, and it takes no mask. The other kernels, given groups,
        # would store scores of (B, H, T, S) in fp32.
        k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.tensor, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D), mask.tensor (B or 1, 1, T, T) of 0 and -inf -> (B, H, T, D)."""
    assert mask.tensor is not None
    B, H, T, D = q.shape
    K, G = k.shape[1], H // k.shape[1]
    q = q.reshape(B, K, G, T, D) * D**-0.5
    rows = -(-T // BLOCKS)
    out = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first = 0 if mask.reach is None else max(start - mask.reach + 1, 0)  # of the keys that the block can see
        R, S = stop - start, stop - first
        block = q[:, :, :, start:stop].reshape(B, K, G * R, D)
        scores = block @ k[:, :, first:stop].transpose(-1, -2)  # (B, K, G*R, S)
        scores = scores.view(B, K, G, R, S) + mask.tensor[:, :, None, start:stop, first:stop]
        weights = scores.softmax(-1).view(B, K, G * R, S)  # computed in fp32 inside, kept in the dtype of q
        out.append((weights @ v[:, :, first:stop]).view(B, K, G, R, D))
    return torch.cat(out, dim=3).view(B, H, T, D)
