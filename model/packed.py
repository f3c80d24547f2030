"""Numbers in 4 or 8 bits, for weights that do not change (QLoRA, arXiv:2305.14314).

    packed = quantize(weight, bits=4)                 # NF4, or with 8 bits Int8
    dequantize(packed, (out, in), dtype)              # the dense weight that is computed with
    mv(packed, x)                                     # the same weight @ x, for one position while a GPU generates

4 bits: NF4 with double quantisation (QLoRA, section 3). 64 weights in a row form a block and share one scale, their
largest absolute value. The scales are quantised to 8 bits themselves: 256 of them share one fp32 scale.

    weight = NF4_CODE[code] * scale                   4 + 8/64 + 32/(64*256) = 4.127 bits a weight
    scale  = dynamic code[scale code] * block_scale + scale_mean

8 bits: one scale a row, as LLM.int8() keeps its weights (arXiv:2208.07339, section 2.1). Its other half, 8-bit inputs
with the outlier columns kept apart, is not here: inputs stay in their own dtype.

    weight = code / 127 * scale                       8 + 32/in_features bits a weight

Codes and dequantised weights equal those of bitsandbytes bit for bit. Its CPU build differs in two places: its compiled
library looks scale codes up in a coarse table and takes a neighbouring code for some (2 in 1,000); and it divides the
last, shorter block by its scale instead of multiplying by the inverse, which matters only at the border of two codes.
Everything here is plain PyTorch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.console import UserError

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own
CELLS = 32  # in an interval of length 1, see `_cells`
PIECE = 1 << 17  # weights that a CPU's core converts at once: in fp32 small enough to stay in its cache

# Quantiles of N(0, 1) scaled to [-1, 1], with an exact 0 (QLoRA, appendix E)
# fmt: off
NF4_CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], device="cpu")  # said explicitly, since this file may be imported under `with torch.device("meta")`
# fmt: on


def _dynamic_code() -> Tensor:
    """(256,), in ascending order: 0, 1, and in decade i of seven, from 1e-7 ... 1e-6 to 0.1 ... 1, the middles of 2^i
    equal intervals, with either sign (arXiv:2110.02861, section 1.3). Where QLoRA's paper says FP8, its code has
    this."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), device="cpu")


def _pairs() -> Tensor:
    """(256,): the two weights that each byte stands for. A pair of fp32 numbers is moved about as one of 64 bits, which
    is faster on a CPU than rows of two. As an integer: Apple's GPUs have no fp64."""
    byte = torch.arange(256, device="cpu")
    return torch.stack([NF4_CODE[byte >> 4], NF4_CODE[byte & 15]], dim=-1).view(torch.int64).view(-1)


def _cells() -> tuple[Tensor, Tensor]:
    """[-1, 1] in 64 equal cells, so small that each holds one border between two NF4 codes at most -> (65,) each: the
    code at the lower edge of a cell, and the border above that code."""
    borders = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
    codes = torch.bucketize(torch.arange(2 * CELLS + 1, device="cpu") / CELLS - 1, borders)
    return codes.to(torch.uint8), torch.cat([borders, torch.tensor([torch.inf], device="cpu")])[codes]


TABLES = dict(nf4_code=NF4_CODE, dynamic_code=_dynamic_code(), pairs=_pairs())
TABLES["cell_codes"], TABLES["cell_borders"] = _cells()
COPIES: dict[str, dict[str, Tensor]] = {}  # device -> the tables there


class NF4(NamedTuple):
    """A weight of n elements in 4 bits. It does not know its shape."""

    codes: Tensor  # (ceil(n/2),) uint8: two codes a byte, the first in the high half
    scale_codes: Tensor  # (ceil(n/64),) uint8
    block_scales: Tensor  # (ceil(n/64/256),) fp32
    scale_mean: Tensor  # () fp32


class Int8(NamedTuple):
    """A weight (out, in) in 8 bits."""

    codes: Tensor  # (out, in) int8, from -127 to 127
    scales: Tensor  # (out,) fp32: the largest absolute value of each row


def quantize(weight: Tensor, bits: int) -> NF4 | Int8:
    return quantize_nf4(weight) if bits == 4 else quantize_int8(weight)


def dequantize(packed: NF4 | Int8, shape: tuple[int, ...], dtype: torch.dtype, how: Callable = lambda f: f) -> Tensor:
    """how: what is made of the function that unpacks, `fused` for example."""
    if isinstance(packed, Int8):
        return how(dequantize_int8)(packed, dtype)
    weight = how(_unpack_nf4)(packed, dtype).view(-1)
    return weight[: torch.Size(shape).numel()].view(shape)


def mv(packed: NF4 | Int8, x: Tensor) -> Tensor:
    """The weight (out, in) @ x (in,) -> (out,) in x's dtype. With 4 bits, `in` is a multiple of BLOCK.

    Compiled it is one kernel that reads the codes and writes no weight; weights are not rounded, and sums are fp32."""
    if not torch.compiler.is_compiling():  # one operation after another, it would write more than the weight
        out = packed.codes.numel() * (2 if isinstance(packed, NF4) else 1) // len(x)
        return torch.mv(dequantize(packed, (out, len(x)), x.dtype), x)
    if isinstance(packed, Int8):
        return ((packed.codes * x.float()).sum(1) * packed.scales / 127).to(x.dtype)
    pairs = x.float().view(-1, BLOCK // 2, 2)  # (blocks of a row, 32, 2)
    codes = packed.codes.view(-1, *pairs.shape[:2])
    code = _table("nf4_code", x.device)
    terms = code[(codes >> 4).int()] * pairs[..., 0] + code[(codes & 15).int()] * pairs[..., 1]
    return (terms * _scales(packed).view(-1, len(pairs), 1)).sum((1, 2)).to(x.dtype)


# ---- 4 bits


def quantize_nf4(weight: Tensor) -> NF4:
    """A weight of any shape and floating dtype. Blocks run through it row by row and may cross from one row into the
    next; the last one may be shorter. UserError if it holds NaN or infinity."""
    n = weight.numel()
    blocks = _in_blocks(weight.detach(), BLOCK)
    scales = _largest(blocks)

    def pack(blocks: Tensor, scales: Tensor) -> Tensor:
        codes = _nearest_nf4(blocks, scales)  # (blocks, 64)
        return codes[:, ::2] << 4 | codes[:, 1::2]

    codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
    _convert(pack, codes, blocks, scales)

    mean = scales.mean()
    scale_blocks = _in_blocks(scales - mean, SCALE_BLOCK)
    block_scales = _largest(scale_blocks)
    scale_codes = _nearest(scale_blocks, block_scales, _table("dynamic_code", weight.device))
    # what only fills up the last block is not kept; clones, so that its memory is not kept either
    codes, scale_codes = codes.view(-1)[: (n + 1) // 2], scale_codes.view(-1)[: len(blocks)]
    return NF4(codes.clone(), scale_codes.clone(), block_scales.view(-1), mean)


def _scales(packed: NF4) -> Tensor:
    """-> (blocks, 1) fp32: the scale of each block."""
    codes = _table("dynamic_code", packed.codes.device).index_select(0, packed.scale_codes.int())
    block = torch.arange(len(codes), device=codes.device) // SCALE_BLOCK
    return (codes * packed.block_scales.index_select(0, block) + packed.scale_mean)[:, None]


def _unpack_nf4(packed: NF4, dtype: torch.dtype) -> Tensor:
    """-> (blocks, 64): the weight, and what fills up the last block. Computed in fp32 and rounded once."""
    scales = _scales(packed)

    def unpack(codes: Tensor, scales: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # one kernel; a look-up of two would be written down, and read again
            both = codes[..., None] >> 4 * torch.arange(1, -1, -1, device=codes.device) & 15
            return _table("nf4_code", codes.device)[both.view(-1, BLOCK)] * scales
        pairs = _table("pairs", codes.device).index_select(0, codes.reshape(-1).int())  # a look-up gives two weights
        return pairs.view(torch.float32).view(-1, BLOCK).mul_(scales)

    weight = torch.empty(len(scales), BLOCK, dtype=dtype, device=packed.codes.device)
    return _convert(unpack, weight, _in_blocks(packed.codes, BLOCK // 2), scales)


# ---- 8 bits


def quantize_int8(weight: Tensor) -> Int8:
    """weight (out, in). UserError if it holds NaN or infinity."""
    weight = weight.detach()
    scales = _largest(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    inverse = 127 / scales.clamp(min=1e-36)  # finite for a row of zeros too
    _convert(lambda w, inverse: (w * inverse).round(), codes, weight, inverse)
    return Int8(codes, scales.view(-1))


def dequantize_int8(packed: Int8, dtype: torch.dtype) -> Tensor:
    """-> the weight (out, in) in this dtype. Computed in fp32 and rounded once."""
    weight = torch.empty(packed.codes.shape, dtype=dtype, device=packed.codes.device)
    return _convert(lambda codes, scale: (codes * scale).mul_(1 / 127), weight, packed.codes, packed.scales[:, None])


# ---- both


def _in_blocks(values: Tensor, size: int) -> Tensor:
    """-> (blocks, size), the last block filled up with zeros."""
    values = values.reshape(-1)
    missing = -len(values) % size
    return (F.pad(values, (0, missing)) if missing else values).view(-1, size)


def _largest(rows: Tensor) -> Tensor:
    """rows (N, m) -> (N, 1) fp32: the largest absolute value of each row."""
    low, high = rows.aminmax(dim=-1, keepdim=True)  # unlike abs(), this needs no second copy of the weight
    largest = torch.maximum(high, -low).float()
    if not largest.isfinite().all():
        raise UserError("the weight holds NaN or infinity and cannot be quantised; is its file damaged?")
    return largest


def _nearest(rows: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """rows (N, m), scales (N, 1), code in ascending order -> (N, m) uint8: the entry next to row / scale."""
    borders = (code[:-1] + code[1:]) / 2
    return torch.bucketize(_scaled(rows, scales), borders, out_int32=True).to(torch.uint8)


def _nearest_nf4(rows: Tensor, scales: Tensor) -> Tensor:
    """`_nearest` in NF4_CODE. Two look-ups and a comparison are five times as fast on a CPU as a search."""
    x = _scaled(rows, scales).view(-1)
    cell = ((x + 1) * CELLS).int()
    border = _table("cell_borders", x.device).index_select(0, cell)
    return (_table("cell_codes", x.device).index_select(0, cell) + (x > border)).view(rows.shape)


def _scaled(rows: Tensor, scales: Tensor) -> Tensor:
    """Multiplied by the inverse and kept from dividing by 0 exactly as bitsandbytes does: codes at the border between
    two entries depend on it."""
    return rows.float() * (1 / scales.clamp(min=1e-38))


def _table(name: str, device: torch.device) -> Tensor:
    """A table on this device. One copy is kept there: moving it at every step would make the host wait."""
    if device.type == "cpu":
        return TABLES[name]
    keep_tables(device)
    return COPIES[str(device)][name]


def keep_tables(device: torch.device) -> None:
    """Copies the tables to the device, once. To be called before code is compiled: the copies would be a part of it."""
    if str(device) not in COPIES:
        COPIES[str(device)] = {name: table.to(device) for name, table in TABLES.items()}


def _convert(function: Callable[..., Tensor], out: Tensor, *inputs: Tensor) -> Tensor:
    """-> out, or where it is compiled another of its dtype: function(*inputs), where row i of the result needs row i of
    each input only.

    On a CPU this goes piece by piece: temporary results then stay in the cache and are small whatever the layer's
    size. A GPU is faster with all at once, and so is the compiler, which makes one kernel of it."""
    if torch.compiler.is_compiling():
        return function(*inputs).to(out.dtype)
    rows = len(out)
    if out.is_cpu:
        rows = max(1, PIECE * torch.get_num_threads() // out.shape[-1])
    for here, *there in zip(out.split(rows), *(tensor.split(rows) for tensor in inputs)):
        here.copy_(function(*there))
    return out
