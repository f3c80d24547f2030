"""Causal attention with grouped queries: one function, and the kernels it chooses from.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, G = H/K queries that share a key, D head size.

    sdpa      torch's scaled_dot_product_attention: any device, any mask, KV cache
    varlen    torch's flash attention over segments of any length, for training on CUDA in bf16 or fp16: packed rows
              without a mask, so memory is linear in T
    flash     the same for generation: parts of prompts, or single queries over keys in a fixed room, of which a tensor
              says how many are there, for CUDA graphs
    apart     torch's flash attention for CPUs, one document after the other, for training on CPUs in fp32: long
              packed rows without a mask, so memory is linear in T
    blocked   for training on CPUs in bf16: batched matrix products over blocks of queries. Block i only multiplies with
              the keys it may see, and the G queries of a group are folded into rows, which keeps the products large.

Which keys a query may see is prepared before the first layer as an `AttentionMask`, once for all layers with the same
window. A query sees itself and what stands before it in its own document, with a sliding window only the nearest
`window` of these. Documents packed into one row never see each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 4  # of queries: skips 3/8 of the products; more blocks are smaller and slower (measured at T = 512)
SMALLEST_BLOCK = 128  # queries: four blocks of 32 took longer than one of 128 (LoRA on 0.5B, T = 128)
# Positions: room is made for one document in so many. Flash attention's backward pass takes memory for 128 positions
# more for each of them, empty or not, and starts work for all of max_q.
SHORT = 128
LONG = 512  # positions: in rows of 256, one call for each document costs more than it saves (nano, documents of 55)
VARLEN: Callable[..., Any] | None = None  # torch's kernel, once `load_varlen` has found it
HAS_FLASH = torch.backends.cuda.is_flash_attention_available()  # torch's builds for Windows are made without it


class Segments(NamedTuple):
    """The documents of B rows of T positions, for `varlen` and kernels like it. The rows are read one after the other,
    as B * T positions.

    Segment n has the queries queries[n] ... queries[n + 1] - 1 and the keys keys[n] ... keys[n + 1] - 1. The last of
    its queries is at the place of the last of its keys, and each sees what stands before it. Segments that are not
    needed are empty, so that there is the same number in almost every batch, and compiled code is used again.
    """

    queries: Tensor  # (N + 1,) int32
    keys: Tensor  # (N + 1,) int32
    gather: Tensor | None = None  # (M,) int64, the position of each key, then filling; None: the positions in order

    def to(self, device: torch.device) -> Segments:
        gather = None if self.gather is None else self.gather.to(device)
        return Segments(self.queries.to(device), self.keys.to(device), gather)


class AttentionMask(NamedTuple):
    """Which keys a query sees, in the form the kernel wants. sdpa without a tensor: causal if T == S, all if T == 1."""

    kernel: str  # "sdpa" | "varlen" | "flash" | "apart" | "blocked"
    tensor: Tensor | None = None  # (B or 1, 1, T, S): 0 where a key is visible, else -inf, to be added to the scores
    reach: int | None = None  # no query sees a key that stands this many places before it, or more; None: unknown
    segments: Segments | None = None  # for `varlen`, `flash` and `apart`
    used: Tensor | None = None  # for `flash` with single queries: how many keys each segment has, (N,) int32
    most: int = 0  # for `flash`: no segment has more keys


def find_segments(documents: Tensor, prefixes: Tensor | None = None, one_size: bool = False) -> Segments:
    """documents and prefixes (B, T), as in `build_mask`, on the CPU -> segments on the CPU.

    A document with a prefix gets the prefix's keys before its own. So the keys of a prompt that two answers share are
    there three times; its queries, and all scores, are computed once.

    one_size: as many keys in all batches of this shape, if no prompt has more than two answers, for compiled code.
    """
    B, T = documents.shape
    opens = torch.ones(B, T, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    begins = opens.flatten().nonzero().flatten()
    room = max(B * T // SHORT, 1)
    while room < len(begins):
        room *= 2
    queries = torch.full((room + 1,), B * T, dtype=torch.int32)
    queries[: len(begins)] = begins
    if prefixes is None:
        return Segments(queries, queries)
    stops = [*begins[1:].tolist(), B * T]
    place: dict[tuple[int, int], range] = {}  # row, number of a document -> its positions
    pieces: list[range] = []
    lengths = []
    numbers = (numbers.flatten()[begins].tolist() for numbers in (documents, prefixes))
    for begin, stop, own, prefix in zip(begins.tolist(), stops, *numbers):
        seen = [range(begin, stop)]
        place[begin // T, own] = seen[0]
        if prefix != own and (prompt := place.get((begin // T, prefix))):  # a prompt of one token has no document
            seen.insert(0, prompt)
        pieces += seen
        lengths.append(sum(map(len, seen)))
    total, step = sum(lengths), 3 * B * T if one_size else max(B * T // 2, 1)
    keys = torch.full((room + 1,), total, dtype=torch.int32)
    keys[0] = 0
    keys[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
    # the filling reads all positions in turn: were they one, a GPU would add up its gradients one after the other
    gather = torch.arange(-(-total // step) * step) % (B * T)
    gather[:total] = torch.cat([torch.arange(piece.start, piece.stop) for piece in pieces])
    return Segments(queries, keys, gather)


def build_mask(
    positions: Tensor,
    documents: Tensor | None,
    like: Tensor,
    kernel: str,
    prefixes: Tensor | None = None,
    window: int | None = None,
    segments: Segments | None = None,
) -> AttentionMask:
    """positions (B or 1, T): of each token in its document. documents (B, T): the number of each token's document.
    prefixes (B, T): the number of a second document that a query at this place sees too.
    window: a query sees the keys at distances 0 ... window - 1, as in Hugging Face's models. The distance is that of
        positions, since an answer may stand in its row far behind the prompt that it continues (`prefixes`).
    like: a tensor (B, T, ...) with the dtype and device of the mask.
    segments: of these documents, on the device; made here if it is missing, which waits for the device.
    """
    T = positions.shape[1]
    if window is not None and window >= T:
        window = None  # everything is near
    if kernel == "varlen":
        load_varlen()
        if documents is None:
            every = torch.arange(len(like) + 1, dtype=torch.int32, device=like.device) * T
            segments = Segments(every, every)
        elif segments is None:
            segments = find_segments(documents.cpu(), None if prefixes is None else prefixes.cpu()).to(like.device)
        return AttentionMask(kernel, None, window, segments)
    if kernel == "apart" and documents is not None and prefixes is None and window is None:
        return AttentionMask(kernel, None, None, segments or find_segments(documents))
    if kernel != "blocked" and documents is None and window is None:
        if T == 1 or is_causal_works(like.device):
            return AttentionMask("sdpa")
    place = torch.arange(T, device=like.device)
    mask = place <= place[:, None]  # (T, T)
    if documents is not None:
        same = documents[:, None, :] == documents[:, :, None]  # (B, T, T)
        if prefixes is not None:
            same = same | (documents[:, None, :] == prefixes[:, :, None])
        mask = mask & same
    if window is not None:
        mask = mask & (positions[:, :, None] - positions[:, None, :] < window)
    added = additive(mask.view(-1, 1, T, T), like.dtype)
    return AttentionMask("blocked" if kernel == "blocked" else "sdpa", added, window if prefixes is None else None)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Booleans (..., T, S) -> numbers to be added to the scores, 0 or -inf.

    Of booleans sdpa would make these itself, and keep them for the backward pass, in every layer. So it would on GPUs
    with copies of a mask whose rows begin at odd places: here they begin at multiples of 8.
    """
    *outer, keys = visible.shape
    room = torch.zeros(*outer, -(-keys // 8) * 8, dtype=dtype, device=visible.device)
    return room[..., :keys].masked_fill_(~visible, float("-inf"))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D)."""
    if mask.kernel == "varlen":
        return varlen_attention(q, k, v, mask)
    if mask.kernel == "flash":
        return flash_attention(q, k, v, mask)
    if mask.kernel == "apart":
        assert mask.segments is not None
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return _attention_apart(*flat, mask.segments.queries)[0].view(q.shape)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before positions
    if mask.kernel == "blocked":
        return blocked_attention(q, k, v, mask).transpose(1, 2)
    H, T, D = q.shape[1:]
    tensor = None if mask.tensor is None else mask.tensor.to(q.dtype)  # a cache may be wider than the rest
    if T == 1 and len(q) == 1 and q.is_cuda:
        return alone(q, k, v, tensor).transpose(1, 2)
    if T == 1:  # the G queries of a group take the place of positions: the keys are read once, not G times
        out = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, D), k, v, tensor)
        return out.reshape(q.shape).transpose(1, 2)
    causal = tensor is None and T == k.shape[2]
    if q.device.type == "cuda" and not (causal and has_flash(q.device, q.dtype, D)):
        # Only flash attention shares keys between queries there, and it takes no mask. The other kernels, given groups,
        # would store scores of (B, H, T, S) in fp32.
        k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=tensor, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A single query, q (1, H, 1, D), k and v (1, K, S, D) -> (1, H, 1, D). The K groups take the place of rows: so a
    GPU works on all heads at once, and what it writes need not be put in order."""
    k, v = (t.transpose(0, 1).expand(-1, q.shape[1] // t.shape[1], -1, -1) for t in (k, v))  # (K, G, S, D), no copy
    return F.scaled_dot_product_attention(q.reshape(*k.shape[:2], 1, -1), k, v, mask).reshape(q.shape)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Parts of prompts in one row, q (1, T, H, D), k and v (1, S, K, D). Or with `used` a query in each row, q
    (B, 1, H, D), k and v (B, S, K, D) where the keys of a head lie together. -> the shape of q

    Then each head of keys is a segment of its own, whose G queries the kernel takes for heads. With one head of keys it
    makes rows of them without a copy, and divides long segments among the GPU's processors ("Flash-Decoding", Dao et
    al., 2023). It does neither where G is 1 or where there is a window.
    """
    if mask.used is None:
        return flash(q[0], k[0], v[0], mask, min(q.shape[1], mask.most))[None]
    queries = q.reshape(len(mask.used), -1, q.shape[-1])  # (B * K, G, D)
    k, v = (t.transpose(1, 2).reshape(-1, 1, t.shape[-1]) for t in (k, v))  # (B * K * S, 1, D), no copy
    return flash(queries, k, v, mask, 1).view(q.shape)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, most: int) -> Tensor:
    """torch's kernel, q (M, H, D), k and v (N, K, D) -> (M, H, D). most: no segment has more queries. Its public
    function knows `used` from torch 2.12 on, and takes two seconds to load."""
    assert mask.segments is not None
    shape = mask.segments.queries, mask.segments.keys, most, mask.most
    options = dict(dropout_p=0.0, is_causal=mask.reach is None, return_debug_mask=False, seqused_k=mask.used)
    if mask.reach is not None:  # how many keys before and after a query it sees
        options |= dict(window_size_left=mask.reach - 1, window_size_right=0)
    return torch.ops.aten._flash_attention_forward(q, k, v, *shape, **options)[0]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
    assert mask.segments is not None and VARLEN is not None
    T, segments = q.shape[1], mask.segments
    shape, (q, k, v) = q.shape, (t.flatten(0, 1) for t in (q, k, v))  # (B * T, heads, D)
    if segments.gather is not None:
        # keys that belong to no segment get no gradient from the kernel, not even 0: `where` leaves them out
        place = torch.arange(len(segments.gather), device=k.device)
        used = (place < segments.keys[-1])[:, None, None]
        k, v = (torch.where(used, t[segments.gather], t.new_zeros(())) for t in (k, v))
    near = (-1 if mask.reach is None else mask.reach - 1, 0)  # how many keys before and after a query it sees; -1: all
    out = VARLEN(q, k, v, segments.queries, segments.keys, T, T, window_size=near)
    return out.view(shape)


def load_varlen() -> bool:
    """Finds torch's flash attention over segments -> whether there is one that knows windows (torch 2.11 and newer).
    Not part of compiled code, and not done at the start: importing it takes seconds."""
    global VARLEN
    if VARLEN is None:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return False
        options = inspect.signature(varlen_attn).parameters
        if "enable_gqa" in options:  # since 2.12; before, the kernel takes fewer key heads without being asked
            VARLEN = partial(varlen_attn, enable_gqa=True)
        elif "window_size" in options:
            VARLEN = varlen_attn
    return VARLEN is not None


def choose_kernels(device: torch.device, masks: Iterable[AttentionMask]) -> AbstractContextManager[None]:
    """Context in which sdpa leaves out cuDNN's kernels, but for training without a mask, where they are the fastest.
    From torch 2.11 on, it prefers them on Hopper and Blackwell.

    Without gradients, lengths change from call to call: cuDNN plans each new shape, for a tenth of a second, and each
    token has one. On Blackwell it is wrong there too (https://github.com/pytorch/pytorch/issues/193893). With a mask,
    gradients may be NaN (https://github.com/pytorch/pytorch/issues/196678). With segments, which torch may give it
    from 2.15 on, an empty one may be NaN (https://github.com/NVIDIA/cudnn-frontend/issues/943).
    """
    fit = torch.is_grad_enabled() and all(mask.tensor is None and mask.segments is None for mask in masks)
    return nullcontext() if device.type != "cuda" or fit else _without_cudnn()


@contextmanager
def _without_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def is_causal_works(device: torch.device) -> bool:
    """Whether sdpa may be told `is_causal` there. On Apple's GPUs, in half precision, queries then see later keys
    (https://github.com/pytorch/pytorch/issues/195910)."""
    return device.type != "mps"


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash attention runs there, forward and backward: from Ampere on, in half precision. Heads of
    more than 128 have no backward pass on all of these cards."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim > 128 or head_dim % 8:
        return False
    return HAS_FLASH and torch.cuda.get_device_capability(device) >= (8, 0)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D), mask.tensor (B or 1, 1, T, T) of 0 and -inf -> (B, H, T, D)."""
    assert mask.tensor is not None
    B, H, T, D = q.shape
    K, G = k.shape[1], H // k.shape[1]
    q = q.reshape(B, K, G, T, D) * D**-0.5
    rows = max(-(-T // BLOCKS), SMALLEST_BLOCK)
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


# Ops of their own, as in model/moe.py: traced, lengths that are numbers in a tensor would break the graph.


@torch.library.custom_op("sparrow::attention_apart", mutates_args=())
def _attention_apart(q: Tensor, k: Tensor, v: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, H, D), k and v (N, K, D), begins (documents + 1,) -> (N, H, D), and what the backward pass needs (N, H)."""
    lengths = [n for n in begins.diff().tolist() if n]
    parts = zip(*(_by_document(t, lengths) for t in (q, k, v)))
    outs, sums = zip(*(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part, 0.0, True) for part in parts))
    return _joined(outs), torch.cat([log_sum.mT[0] for log_sum in sums])


@torch.library.custom_op("sparrow::attention_apart_backward", mutates_args=())
def _apart_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, begins: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `out`, all shaped as in `_attention_apart`."""
    lengths = [n for n in begins.diff().tolist() if n]
    parts = zip(*(_by_document(t, lengths) for t in (grad, q, k, v, out)), (t.mT[None] for t in log_sum.split(lengths)))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    of_q, of_k, of_v = zip(*(backward(*part, 0.0, True) for part in parts))
    return _joined(of_q), _joined(of_k), _joined(of_v)


def _by_document(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """(N, heads, D) -> views (1, heads, length, D)."""
    return [part.transpose(0, 1)[None] for part in x.split(lengths)]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part[0].transpose(0, 1) for part in parts])


@_attention_apart.register_fake
def _(q, k, v, begins):
    return torch.empty_like(q), q.new_empty(q.shape[:2])


@_apart_backward.register_fake
def _(grad, q, k, v, out, log_sum, begins):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs, output) -> None:
    q, k, v, begins = inputs
    ctx.save_for_backward(q, k, v, *output, begins)


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_apart_backward(grad.contiguous(), *ctx.saved_tensors), None


_attention_apart.register_autograd(_backward, setup_context=_keep)
