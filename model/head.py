"""The loss of the output head without all of its logits: made, used and forgotten a chunk of positions at a time.

With 151,936 words, the logits of 4 x 2,048 positions are 1.2 billion numbers, and a plain loss keeps five copies of
them: in bf16, in fp32, as log-probabilities, and two gradients. Here the forward pass keeps nothing but its input.

    trained head  the backward pass makes each chunk's logits again, and from them at once the gradients of input and
                  weight. This costs one more product with the head's weight, which is why `CausalLM` calls it only
                  where there are many logits.
    frozen head   (LoRA) the forward pass computes the gradient of its input at once, and keeps only that. The backward
                  pass multiplies it by the weight that each position has in the loss. This costs nothing more.

N = positions, d = hidden size, V = words
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# (logits (n, V) of some positions in the compute dtype, which positions) -> (n, ...) fp32
Loss = Callable[[Tensor, slice], Tensor]
PIECE = 1 << 19  # logits that a CPU's core works on at once: in fp32 small enough to stay in its cache
PIECE_ELSEWHERE = 1 << 24  # those of other devices: 64 MiB in fp32, enough work for a kernel


def loss_in_chunks(x: Tensor, weight: Tensor, loss: Loss, size: int) -> Tensor:
    """x (N, d), weight (V, d) -> (N, ...): `loss` of the logits x @ weight.T, `size` positions at a time.

    What `loss` returns for a position may depend on the logits of that position only, and nothing it uses gets a
    gradient but its logits. It is called again in the backward pass of a trained weight, and has to return the same.
    """
    frozen = x.requires_grad and not weight.requires_grad and torch.is_grad_enabled()
    function = _LossOfFrozenHead if frozen else _LossInChunks
    return function.apply(x, weight, loss, size)  # pyright: ignore[reportReturnType]


class _LossInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, loss: Loss, size: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.loss, ctx.size = loss, size
        cast = weight.to(x.dtype)
        return torch.cat([loss(F.linear(x[rows], cast), rows) for rows in _chunks(len(x), size)])

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
                out = ctx.loss(logits, rows)
            (of_logits,) = torch.autograd.grad(out, logits, grad[rows])  # (n, V)
            del logits, out
            if grad_x is not None:
                torch.mm(of_logits, cast, out=grad_x[rows])
            if grad_weight is not None:  # summed in the weight's dtype, which is fp32 where it is trained
                grad_weight += of_logits.T @ x[rows]
            del of_logits  # before the next chunk's logits are made
        return grad_x, grad_weight, None, None


class _LossOfFrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, loss: Loss, size: int) -> Tensor:
        cast, found, gradients = weight.to(x.dtype), [], []
        for rows in _chunks(len(x), size):
            logits = F.linear(x[rows], cast).requires_grad_()
            with torch.enable_grad():
                out = loss(logits, rows)
                sums = [number.sum() for number in (out.flatten(1).unbind(1) if out.dim() > 1 else [out])]
            gradients.append(x.new_empty(len(sums), *x[rows].shape))
            for i, number in enumerate(sums):
                (of_logits,) = torch.autograd.grad(number, logits, retain_graph=i + 1 < len(sums))
                torch.mm(of_logits, cast, out=gradients[-1][i])
            found.append(out.detach())
            del logits, out, sums, number, of_logits
        ctx.save_for_backward(torch.cat(gradients, dim=1))  # (m, N, d)
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (gradients,) = ctx.saved_tensors
        weights = grad.reshape(len(grad), -1).T[..., None]  # (m, N, 1) fp32
        return (gradients * weights).sum(0).to(gradients.dtype), None, None, None


def _chunks(positions: int, size: int) -> list[slice]:
    """As few as possible, and all of about one length: products of a few positions are slow."""
    count = max(-(-positions // size), 1)
    size = max(-(-positions // count), 1)
    return [slice(size * i, min(size * (i + 1), positions)) for i in range(count)]


# ---- cross-entropy


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (n, V) in any dtype, targets (n,), -100: none -> (n,) fp32, computed in fp32."""
    function = _CompiledCrossEntropy if torch.compiler.is_compiling() else _CrossEntropy
    return function.apply(logits, targets)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    """As F.cross_entropy, which makes six tensors (n, V), most of them in fp32. Here each position's gradient (its
    probabilities, with 1 subtracted at the target) is made together with its loss, and kept in the dtype of the logits.
    On a CPU that happens while the numbers are in its cache: four times as fast with 151,936 words."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        words = logits.shape[1]
        rows = max(PIECE // words, 1) * torch.get_num_threads() if logits.is_cpu else max(PIECE_ELSEWHERE // words, 1)
        for here in _chunks(len(targets), rows):
            target = targets[here, None].clamp(min=0)
            log_p = logits[here].log_softmax(-1, dtype=torch.float32)
            of_target = log_p.gather(1, target)
            losses[here] = -of_target[:, 0]
            if gradient is not None:
                gradient[here] = log_p.exp_().scatter_(1, target, of_target.expm1())
        ignored = targets == -100
        ctx.save_for_backward(gradient, ignored)
        return losses.masked_fill_(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        gradient, ignored = ctx.saved_tensors
        return gradient * grad.masked_fill(ignored, 0)[:, None].to(gradient.dtype), None


class _CompiledCrossEntropy(torch.autograd.Function):
    """The same in a form that becomes two short loops over the logits. In the gradient of F.cross_entropy the compiler
    compares each word's number with the target; here the target's place is filled in afterwards."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        place = targets.clamp(min=0)[:, None]
        most = logits.amax(-1, keepdim=True).float()  # (n, 1)
        log_sum = (logits.float() - most).exp().sum(-1, keepdim=True).log()
        log_p = logits.gather(1, place).float() - most - log_sum
        ctx.save_for_backward(logits, targets, most, log_sum, log_p)
        return -log_p[:, 0].masked_fill(targets == -100, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        logits, targets, most, log_sum, log_p = ctx.saved_tensors
        grad = grad.masked_fill(targets == -100, 0)[:, None]
        of_logits = ((logits.float() - most - log_sum).exp() * grad).to(logits.dtype)
        # p - 1 in fp32: of a p near 1, bf16 would leave nothing
        return of_logits.scatter(1, targets.clamp(min=0)[:, None], (log_p.expm1() * grad).to(logits.dtype)), None
