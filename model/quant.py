"""Weights kept in 4 or 8 bits, for adapters that learn beside a large frozen model (QLoRA, arXiv:2305.14314).

    quantize_model(model, bits=4)                     # every Linear becomes a QuantLinear, in place
    bytes_per_parameter(model)                        # 4 before (fp32); about 0.57 for a Llama of 7B in bf16
    layer.dequantize()                                # the dense weight (out, in) that the layer computes with

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

Only Linear layers are quantised. `model.moe.Experts` holds its weights as stacked parameters; they stay dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.console import UserError
from model.fused import fused, may_compile
from model.layers import Head, Linear

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


def _unpack_nf4(packed: NF4, dtype: torch.dtype) -> Tensor:
    """-> (blocks, 64): the weight, and what fills up the last block. Computed in fp32 and rounded once."""
    blocks = len(packed.scale_codes)
    scale_codes = _in_blocks(packed.scale_codes, SCALE_BLOCK)
    scales = (
        _table("dynamic_code", packed.codes.device).index_select(0, scale_codes.view(-1).int()).view_as(scale_codes)
    )
    scales = (scales * packed.block_scales[:, None]).view(-1, 1)[:blocks] + packed.scale_mean  # (blocks, 1)

    def unpack(codes: Tensor, scales: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # one kernel; a look-up of two would be written down, and read again
            both = codes[..., None] >> 4 * torch.arange(1, -1, -1, device=codes.device) & 15
            return _table("nf4_code", codes.device)[both.view(-1, BLOCK)] * scales
        pairs = _table("pairs", codes.device).index_select(0, codes.reshape(-1).int())  # a look-up gives two weights
        return pairs.view(torch.float32).view(-1, BLOCK).mul_(scales)

    weight = torch.empty(blocks, BLOCK, dtype=dtype, device=packed.codes.device)
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
    if str(device) not in COPIES:
        keep_tables(device)
    return COPIES[str(device)][name]


def keep_tables(device: torch.device) -> None:
    """Copies the tables to the device. To be called before code is compiled: the copies would be a part of it."""
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


# ---- layers


class _QuantMatmul(torch.autograd.Function):
    """x W^T + b with a packed W. It is unpacked again in the backward pass instead of being kept until then, which
    would cost the memory that packing saves. W is frozen: there are gradients of x and b only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, kind: type[NF4 | Int8], shape: tuple[int, int], *tensors: Tensor
    ) -> Tensor:
        ctx.kind, ctx.shape = kind, shape
        ctx.save_for_backward(*tensors)
        return F.linear(x, dequantize(kind(*tensors), shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads  # (..., out)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(ctx.kind(*ctx.saved_tensors), ctx.shape, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, None, *(None for _ in ctx.kind._fields)


class QuantLinear(Linear):
    """A Linear with a frozen weight in 4 or 8 bits. Computes in the dtype of its input, as Linear does.

    It has no `weight`: the tensors of NF4 or Int8 are buffers under their names there, and so in the state dict. A new
    layer's are uninitialised until they are loaded, or `quantize_` fills them."""

    compiles = False  # whether it unpacks with the compiler while a GPU generates (model/precision.py)

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = False, device=None):
        nn.Module.__init__(self)  # not Linear's, which would make a dense weight
        if bits not in (4, 8):
            raise UserError(f"{bits} bits: weights can be kept in 4 or 8")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.kind: type[NF4 | Int8] = NF4 if bits == 4 else Int8
        n = out_features * in_features
        blocks = -(-n // BLOCK)
        sizes: Sequence[tuple[tuple[int, ...], torch.dtype]] = (
            (((n + 1) // 2,), torch.uint8),
            ((blocks,), torch.uint8),
            ((-(-blocks // SCALE_BLOCK),), torch.float32),
            ((), torch.float32),
        )
        if bits == 8:
            sizes = (((out_features, in_features), torch.int8), ((out_features,), torch.float32))
        for name, (shape, dtype) in zip(self.kind._fields, sizes):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, device=device)) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> QuantLinear:
        """The same layer with its weight packed; the bias is shared. The dense weight is left alone."""
        layer = cls(linear.in_features, linear.out_features, bits, device="meta")
        if not linear.weight.is_meta:
            layer.quantize_(linear.weight)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def quantize_(self, weight: Tensor) -> None:
        """Takes this weight (out, in), on its device. For loaders that build the model on `meta` and read one dense
        weight after another."""
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight {tuple(weight.shape)} for a layer {(self.out_features, self.in_features)}")
        for name, tensor in quantize(weight, self.bits)._asdict().items():
            setattr(self, name, tensor)

    @property
    def packed(self) -> NF4 | Int8:
        return self.kind(*(getattr(self, name) for name in self.kind._fields))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> (out, in): the weight that forward computes with."""
        return dequantize(self.packed, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.compiles and may_compile(x):
            return F.linear(x, dequantize(self.packed, (self.out_features, self.in_features), x.dtype, fused), bias)
        return _QuantMatmul.apply(x, bias, self.kind, (self.out_features, self.in_features), *self.packed)

    def _apply(self, fn, recurse=True):
        """Moves with its model, but keeps its scales in fp32: model.bfloat16() would round them."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def quantize_model(model: nn.Module, bits: int) -> list[str]:
    """Packs the weights of all Linear layers but the head, one after another and in place -> the layers' names.

    Each dense weight is freed before the next is packed, unless somebody else holds it. A model on `meta` gives the
    empty layers to load packed weights into.

    The head may be the embedding too. Embeddings, norms, routers and stacked experts are no Linear of ours and stay
    dense as well.
    """
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, kind in kinds.items():
        if kind not in (Linear, Head, QuantLinear):
            raise ValueError(f"{name} is a {kind.__name__}: quantise first, then add adapters")
    names = [name for name, kind in kinds.items() if kind is Linear]
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear)
        try:
            model.set_submodule(name, QuantLinear.from_linear(layer, bits))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return names


def unpack_model(model: nn.Module, dtype: torch.dtype) -> None:
    """The reverse of `quantize_model`, in place: Linear layers with the weights that the packed ones compute with."""
    for name, layer in quantized(model).items():
        with torch.device("meta"):
            dense = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight, dense.bias = nn.Parameter(layer.dequantize(dtype), requires_grad=False), layer.bias
        model.set_submodule(name, dense.train(layer.training))


def choose_bits(four: bool | None, eight: bool | None, trained: int | None) -> int | None:
    """What --load_in_4bit and --load_in_8bit mean (None: not said) for an adapter that was trained beside weights of
    `trained` bits: another number if it is asked for, and no packing if its own is refused."""
    asked = {4: four, 8: eight}
    as_trained = trained if trained and asked[trained] is None else None
    return next((bits for bits, wanted in asked.items() if wanted), as_trained)


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    """The packed layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def bytes_per_parameter(model: nn.Module) -> float:
    """Bytes of all parameters and buffers per parameter of the dense model; tied weights count once."""
    total = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    packed = sum(layer.in_features * layer.out_features for layer in quantized(model).values())
    return total / (packed + sum(parameter.numel() for parameter in model.parameters()))
