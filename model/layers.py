"""The layers that blocks are made of.

Weights may be fp32 masters while the model computes in bf16. Instead of torch's autocast, every Linear casts its weight
to the dtype of its input: the cast is visible here, torch.compile fuses it, and it costs nothing if the weight has that
dtype already. Norms are computed in fp32.

Letters: d hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.head import Loss, loss_in_chunks


def generating() -> bool:
    """Whether this is generation. The compiler is not asked for the mode: it would split each block into two graphs."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def generating_on_gpu(x: Tensor) -> bool:
    return not x.is_cpu and generating()


class Linear(nn.Linear):
    """Computes in the dtype of its input, whatever dtype the weight is kept in."""

    by_vector = False  # whether one position goes through torch.mv on CPUs (model/precision.py)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if self.by_vector and x.is_cpu and x.numel() == self.in_features:  # nearly twice as fast as F.linear
            y = torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return F.linear(x, weight, bias)


def add(stream: Tensor, layer: nn.Module, x: Tensor) -> Tensor:
    """stream (..., d) + layer(x), where a GPU generates in place: the product adds to it what it has computed."""
    if type(layer) is Linear and layer.bias is None and generating_on_gpu(x) and layer.weight.dtype == stream.dtype:
        stream.view(-1, stream.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), layer.weight.mT)
        return stream
    return stream + layer(x)


class Head(Linear):
    """The last layer: logits, or with `loss` what it makes of them, `size` positions at a time (model/head.py). This is
    part of `forward` because ZeRO's stage 3 has the weight only while its layer computes."""

    def forward(self, x: Tensor, loss: Loss | None = None, size: int = 0) -> Tensor:
        """x (..., d) -> (..., V); with a loss (N, d) -> (N, ...)"""
        return super().forward(x) if loss is None else loss_in_chunks(x, self.weight, loss, size)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 (arXiv:1910.07467, eq. 4)."""

    # made from the weight for generation (model/precision.py)
    twice: Tensor | None  # (2 * size,): it stands there twice; for the norm of one token on a CPU
    rounded: Tensor | None  # (size,) in half precision, for GPUs

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        for name in ("twice", "rounded"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.twice is not None and x.is_cpu and x.numel() == len(self.weight):
            # (x, -x) has the mean 0 and the variance mean(x²); rms_norm, eight operations here, takes twice as long
            both = F.layer_norm(torch.cat((x, -x), dim=-1), self.twice.shape, self.twice, None, self.eps)
            return both[..., : len(self.weight)]
        if self.rounded is not None and self.rounded.dtype == x.dtype and generating_on_gpu(x):
            return F.rms_norm(x, self.rounded.shape, self.rounded, self.eps)  # one kernel, with fp32 inside
        if generating() or not (x.is_cpu or torch.compiler.is_compiling()):
            # torch's own is the same in fewer operations; on GPUs three kernels, not seven, and half the memory
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * self.weight.float()).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202, eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.gate_up_proj: Linear | None = None  # both in one (model/precision.py)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x (..., d) -> the same shape, added to `onto` if it is given."""
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y = F.silu(gate) * up
        return self.down_proj(y) if onto is None else add(onto, self.down_proj, y)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there it would change nothing, after importing torch's compiler for two seconds
            super().reset_parameters()
