"""The loss of the output head without all of its logits: made, used and forgotten a chunk of positions at a time.

With 151,936 words, the logits of 4 x 2,048 positions are 1.2 billion numbers, and a plain loss keeps five copies of
them: in bf16, in fp32, as log-probabilities, and two gradients. Here the forward pass keeps nothing but its input. The
backward pass makes each chunk's logits again, and from them at once the gradients of input and weight. This costs one
more product with the head's weight, which is why `CausalLM` calls it only where there are many logits.

N = positions, d = hidden size, V = words
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Loss = Callable[[Tensor, slice], Tensor]  # (fp32 logits (n, V) of some positions, which ones) -> (n, ...) fp32


def loss_in_chunks(x: Tensor, weight: Tensor, loss: Loss, size: int) -> Tensor:
    """x (N, d), weight (V, d) -> (N, ...): `loss` of the logits x @ weight.T, `size` positions at a time.

    `loss` is called again in the backward pass, and has to return the same. Nothing it uses gets a gradient but its
    logits.
    """
    return _LossInChunks.apply(x, weight, loss, size)  # pyright: ignore[reportReturnType]


class _LossInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, loss: Loss, size: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.loss, ctx.size = loss, size
        cast = weight.to(x.dtype)
        return torch.cat([loss(F.linear(x[rows], cast).float(), rows) for rows in _chunks(len(x), size)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight = ctx.saved_tensors
        cast = weight.to(x.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(x), ctx.size):
            logits = F.linear(x[rows], cast).requires_grad_()
            with torch.enable_grad():
                out = ctx.loss(logits.float(), rows)
            (of_logits,) = torch.autograd.grad(out, logits, grad[rows])  # (n, V)
            del logits, out
            if grad_x is not None:
                torch.mm(of_logits, cast, out=grad_x[rows])
            if grad_weight is not None:  # summed in the weight's dtype, which is fp32 where it is trained
                grad_weight += of_logits.T @ x[rows]
        return grad_x, grad_weight, None, None


def _chunks(positions: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, positions)) for begin in range(0, positions, size)]
