"""Layers whose weights are kept in 4 or 8 bits, for adapters that learn beside a large frozen model (QLoRA,
arXiv:2305.14314). model/packed.py has the numbers.

    quantize_model(model, bits=4)                     # every Linear becomes a QuantLinear, in place
    bytes_per_parameter(model)                        # 4 before (fp32); about 0.57 for a Llama of 7B in bf16
    layer.dequantize()                                # the dense weight (out, in) that the layer computes with

Only Linear layers are quantised. `model.moe.Experts` holds its weights as stacked parameters; they stay dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.console import UserError
from model.fused import fused, may_compile
from model.layers import Head, Linear
from model.packed import BLOCK, NF4, SCALE_BLOCK, Int8, dequantize, keep_tables, mv, quantize


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

    compiles = False  # whether it uses the compiler while a GPU generates (model/precision.py)

    def __init__(self, in_features: int, out_features: int, bits: int, device=None):
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
        self.register_parameter("bias", None)

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
            keep_tables(x.device)
            if x.numel() == self.in_features and (self.bits == 8 or self.in_features % BLOCK == 0):
                y = fused(mv)(self.packed, x.reshape(-1)).view(*x.shape[:-1], -1)
                return y if bias is None else y + bias
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
