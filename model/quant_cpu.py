"""Weights in int8 or int4 for generating on CPUs, which is faster the fewer bytes a token has to read.

    quantize_for_cpu(model, "int4")                   # every Linear with its head, in place -> a remark to print

A few positions at a time, torch's own kernels compute with the packed weights. They take bf16 inputs, and sum in fp32.
For many positions, a prompt for instance, they are slower than a dense product: the layer is unpacked for it each time.

    int8    weight = code * scale                     one scale a row: 8 + 16/in_features bits a weight
    int4    weight = (code - 8) * scale + zero        both for each 32 weights of a row: 4 + 32/32 = 5 bits a weight

Scales and zeros are bf16, as the kernels want them. They are rounded before the codes are chosen, so this rounding
costs nothing more. These weights are for inference only; model/quant.py has those that adapters are trained beside.

Letters: N output features, K input features, g the size of a group.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.console import UserError
from model.head import Loss
from model.layers import Linear
from model.lora import LoRALinear
from model.quant import QuantLinear
from model.transformer import CausalLM

GROUP = 32  # weights of a row that share a scale and a zero in int4
ROWS_AT_ONCE = 1024  # that are packed: bounds the memory it takes


class CPULinear(Linear):
    """A Linear with a packed, frozen weight. It has no `weight`: the packed tensors are buffers.

    It takes the place of the head too, and then `loss` and `size` are those of `model.layers.Head`.
    """

    bits: int
    most_positions: int  # that the kernel is faster for than a dense product, measured with AVX-512 and AMX

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not Linear's, which would make a dense weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        pieces = [self.pack(rows.float()) for rows in linear.weight.detach().split(ROWS_AT_ONCE)]
        for name, dim in self.packed.items():
            self.register_buffer(name, torch.cat([piece[name] for piece in pieces], dim))
        self.bias = linear.bias
        self.fast = self.has_kernel()
        self.train(linear.training)

    packed: dict[str, int]  # the names of the buffers, and the dimension of each that belongs to the N outputs

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        """weight (n, K) fp32, some of the rows -> the buffers of these rows."""
        raise NotImplementedError

    def kernel(self, x: Tensor) -> Tensor:
        """x (M, K) bf16 -> (M, N) bf16"""
        raise NotImplementedError

    def dense(self, x: Tensor) -> Tensor:
        """x (M, K) -> (M, N), by a dense product in the dtype of x"""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """-> (N, K) fp32: the weight that the layer computes with."""
        return self.dense(torch.eye(self.in_features)).T.contiguous()

    def has_kernel(self) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor, loss: Loss | None = None, size: int = 0) -> Tensor:
        if loss is not None:
            begins = range(0, len(x), size)
            return torch.cat([loss(self(x[i : i + size]).float(), slice(i, min(i + size, len(x)))) for i in begins])
        flat = x.reshape(-1, self.in_features)
        if self.fast and len(flat) <= self.most_positions:
            y = self.kernel(flat.bfloat16()).to(x.dtype)
        else:
            y = self.dense(flat)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class Int8Linear(CPULinear):
    bits, most_positions = 8, 16
    packed = dict(codes=0, scales=0)
    codes: Tensor  # (N, K) int8, from -127 to 127
    scales: Tensor  # (N,) bf16

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        # not below 1e-30, so that a row of zeros is not divided by 0
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        codes = (weight / scales.float()[:, None]).round().clamp(-127, 127)
        return dict(codes=codes.to(torch.int8), scales=scales)

    def has_kernel(self) -> bool:
        # with K not divisible by 16 the kernel of torch 2.13 reads past the end of rows, and crashes
        return self.in_features % 16 == 0 and hasattr(torch.ops.aten, "_weight_int8pack_mm")

    def kernel(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales)

    def dense(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype)) * self.scales.to(x.dtype)  # bf16 holds all codes exactly


class Int4Linear(CPULinear):
    bits, most_positions = 4, 32
    packed = dict(codes=0, scales_and_zeros=1)
    codes: Tensor  # (N, K / 2) uint8, in the order of `interleave`
    scales_and_zeros: Tensor  # (K / g, N, 2) bf16

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        return linear.in_features % GROUP == 0 and linear.out_features % 64 == 0

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        groups = weight.view(len(weight), -1, GROUP)  # (n, K/g, g)
        low, high = groups.aminmax(dim=-1)  # (n, K/g)
        scales = ((high - low) / 15).clamp(min=1e-30).bfloat16()
        zeros = (low + 8 * scales.float()).bfloat16()
        codes = (groups - zeros.float()[..., None]) / scales.float()[..., None] + 8
        codes = codes.round().clamp(0, 15).to(torch.uint8).view(weight.shape)
        both = torch.stack([scales, zeros], dim=-1).transpose(0, 1).contiguous()
        return dict(codes=interleave(codes, kernel_block() or 64), scales_and_zeros=both)

    def has_kernel(self) -> bool:
        return kernel_block() is not None

    def kernel(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, GROUP, self.scales_and_zeros)

    def dense(self, x: Tensor) -> Tensor:
        codes = (deinterleave(self.codes, kernel_block() or 64) - 8).view(torch.int8)  # 0 - 8 is 248, as int8 -8
        scales, zeros = self.scales_and_zeros.to(x.dtype).permute(2, 0, 1).contiguous()[:, :, None]  # (K/g, 1, N) each
        weight = torch.addcmul(zeros, codes.to(x.dtype).view(-1, GROUP, self.out_features), scales)
        return x @ weight.view(self.in_features, self.out_features)


# ---- the order of int4 codes


def interleave(codes: Tensor, block: int) -> Tensor:
    """codes (N, K) of 0 ... 15 -> (N, K / 2) uint8, as torch's kernel reads them.

    Rows come in blocks. Within a block one input feature follows the other, and for each there are block / 2 bytes:
    byte i holds row i in its low half, and row i + block / 2 in its high half.
    """
    N, K = codes.shape
    low, high = codes.view(N // block, 2, block // 2, K).unbind(1)  # (N/block, block/2, K)
    return (low | high << 4).transpose(1, 2).reshape(N, K // 2)


def deinterleave(packed: Tensor, block: int) -> Tensor:
    """-> (K, N) uint8: the codes, transposed."""
    N, K = len(packed), 2 * packed.shape[1]
    packed = packed.view(N // block, K, block // 2)
    return torch.cat([packed & 15, packed >> 4], dim=-1).transpose(0, 1).reshape(K, N)


@cache
def kernel_block() -> int | None:
    """The block of rows of torch's int4 kernel, which depends on what the CPU can do; None: there is no kernel, or it
    has another order."""
    codes = torch.arange(128 * 64).view(128, 64) * 2654435761 // 65536 % 16  # no period that an order could hide in
    with suppress(AttributeError, RuntimeError):  # NotImplementedError is one
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return next(
            (block for block in (64, 32) if torch.equal(theirs, interleave(codes.to(torch.uint8), block))), None
        )
    return None


# ---- whole models


def quantize_for_cpu(model: CausalLM, kind: str) -> str:
    """kind int8 or int4: packs all Linear layers in place -> a sentence about it.

    A head that is tied to the embedding gets its own packed copy; the embedding stays, which costs no time. The router
    and the experts of a mixture stay too. A layer whose shape int4 does not fit becomes int8. UserError on devices that
    are not CPUs, and for adapters that are not merged.
    """
    device = model.model.embed_tokens.weight.device
    if device.type != "cpu":
        raise UserError(
            f"--quantize {kind}: torch's kernels for these weights are for CPUs, and this model is on {device}; "
            "leave it out, or use --device cpu"
        )
    counts: Counter[int] = Counter()
    kept = 0
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear) or name.endswith(".gate"):
            continue
        if isinstance(layer, LoRALinear) and not layer.merged:
            raise UserError(
                f"--quantize {kind}: takes weights without adapters; merge them first, with --merge_lora of "
                "eval_model.py, or for good with --lora_path of scripts/convert.py"
            )
        if isinstance(layer, QuantLinear) and not isinstance(layer, LoRALinear):
            raise UserError(f"--quantize {kind}: the weights are in {layer.bits} bits already; leave one of them out")
        if not layer.weight.isfinite().all():
            raise UserError(f"{name}: the weight holds NaN or infinity and cannot be quantised; is its file damaged?")
        packed = Int4Linear(layer) if kind == "int4" and Int4Linear.fits(layer) else Int8Linear(layer)
        model.set_submodule(name, packed)
        counts[packed.bits] += packed.in_features * packed.out_features
        kept += sum(buffer.nbytes for buffer in packed.buffers())
    return describe(kind, counts, kept, any(isinstance(m, CPULinear) and not m.fast for m in model.modules()))


def describe(kind: str, counts: Counter[int], bytes: int, slow: bool) -> str:
    total = sum(counts.values())
    bits = 8 * bytes / max(total, 1)
    said = f"--quantize {kind}: {total / 1e6:.1f}M weights in {bits:.2f} bits each, with their scales"
    if kind == "int4" and counts[8]:
        said += f", {counts[8] / total:.0%} of them in int8 because of their layer's shape"
    if slow:
        said += "; torch has no kernel for them here, so this saves memory but no time"
    return said
