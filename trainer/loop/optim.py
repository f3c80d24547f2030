"""Optimisers, the learning-rate schedule, and the check of the gradients before an update.

AdamW moves everything, or, with `--optimizer muon`, Muon moves the matrices inside the blocks and AdamW the rest
(embedding, head, norms, biases). Muon's updates are scaled to the size of AdamW's, so one learning rate sets both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.precision import has_bf16

# Beside Muon, embedding, head, norms and biases learn at this multiple of the learning rate. By trials, as Muon's
# momentum below: docs/benchmarks.md.
OTHERS_RATE = 4.0
# AdamW makes steps of full size from the tiny gradients of tokens that the text lacks, all in one direction: their
# embeddings would end long and nearly equal, hard to tell apart when a later stage needs them. This weakens it.
OTHERS_EPS = 1e-6
QUINTICS = ((3.4445, -4.7750, 2.0315),) * 5  # of Muon, by Jordan et al.


def learning_rate(step: int, total: int, *, peak: float, warmup: float, schedule: str, floor: float) -> float:
    """Learning rate of step number `step`, from 0, of `total` steps.

    warmup  steps, or below 1 a share of `total`, over which the rate rises linearly to `peak`
    floor   the last rate divided by `peak`
    cosine  half a cosine down to the floor (arXiv:1608.03983, eq. 5)
    wsd     stays at the peak, then falls linearly over the last 40 % (arXiv:2404.06395)
    """
    ramp = round(warmup * total) if warmup < 1 else int(warmup)
    if step < ramp:
        return peak * (step + 1) / ramp
    if schedule == "constant":
        return peak
    begin = ramp if schedule == "cosine" else max(ramp, round(0.6 * total))
    if step < begin:
        return peak
    done = (step + 1 - begin) / max(total - begin, 1)  # 1 at the last step
    falling = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (floor + (1 - floor) * falling)


def set_rates(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Sets the learning rate of all groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("multiple", 1.0)


def build_optimizers(model: nn.Module, name: str, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Optimisers of all trained parameters. Weight decay applies to matrices, not to embeddings, norms and biases."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside = {n for n, p in named if p.dim() >= 2 and not n.endswith(("embed_tokens.weight", "lm_head.weight"))}
    matrices, others = [p for n, p in named if n in inside], [p for n, p in named if n not in inside]
    adamw = dict(lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
    if name == "muon":
        muon = [Muon(matrices, weight_decay=weight_decay)] if matrices else []  # with LoRA there are only matrices
        group = dict(params=others, weight_decay=0.0, multiple=OTHERS_RATE)
        return muon + ([torch.optim.AdamW([group], **adamw | dict(eps=OTHERS_EPS))] if others else [])
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return [torch.optim.AdamW([group for group in groups if group["params"]], **adamw)]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: all its directions get the same length (Jordan et al., 2024,
    https://kellerjordan.github.io/posts/muon), scaled to the size of AdamW's updates (arXiv:2502.16982, eq. 4).

    Matrices of one shape are processed as one batch; a stack of experts is such a batch already. Of several processes,
    each makes its share of every batch orthogonal, which is nearly all of the cost. Like torch's fused optimisers it
    reads `found_inf`, a scalar tensor on the device: if it is 1, nothing changes.
    """

    def __init__(self, params, weight_decay: float = 0.1, momentum: float = 0.9):
        super().__init__(params, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        bad = getattr(self, "found_inf", None)
        if bad is not None and bad.device.type == "cpu":  # a GPU would have to wait for the answer
            if bad:
                return
            bad = None
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            rate = group["lr"] if bad is None else group["lr"] * (1 - bad)
            for shape, params in by_shape.items():
                update = torch.empty(len(params), *shape, dtype=working_dtype(params[0]), device=params[0].device)
                torch._foreach_copy_(list(update), self._momentum(params, group["momentum"], bad))
                update = orthogonalise_together(update.view(-1, *shape[-2:])).view(-1, *shape).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
                torch._foreach_sub_(params, list(update.mul_(rate * 0.2 * math.sqrt(max(shape[-2:])))))

    def _momentum(self, params: list[Tensor], beta: float, bad: Tensor | None) -> list[Tensor]:
        """Updates the momentum buffers -> Nesterov momentum of each matrix: gradient + beta * buffer."""
        gradients = [p.grad for p in params if p.grad is not None]
        if bad is not None:
            # NaN times 0 is NaN: a bad gradient has to be replaced, it cannot be multiplied away
            gradients = [gradient.masked_fill(bad > 0, 0) for gradient in gradients]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, beta if bad is None else torch.where(bad > 0, 1.0, beta))
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=beta))


def working_dtype(of: Tensor) -> torch.dtype:
    """What Muon's products are computed in there: bf16, since they need no precision."""
    return torch.bfloat16 if has_bf16(of.device) else torch.float32


def orthogonalise(G: Tensor, quintics: Sequence[tuple[float, float, float]] = QUINTICS) -> Tensor:
    """(N, a, b) -> matrices with the same singular vectors, and singular values of about 1 (0.7 to 1.2).

    Newton-Schulz iteration: each quintic (a, b, c) takes a singular value s to a s + b s^3 + c s^5.
    """
    X = G.to(working_dtype(G))
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in quintics:  # X = a X + (b A + c A A) X, where A = X X'
        A = X @ X.mT
        X = X.baddbmm(A.baddbmm(A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def orthogonalise_together(G: Tensor) -> Tensor:
    """As `orthogonalise`, of matrices that all processes have: each computes its share and receives the others'."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return orthogonalise(G)
    share = -(-len(G) // world)
    padded = F.pad(G, (0, 0, 0, 0, 0, share * world - len(G)))
    own = orthogonalise(padded[dist.get_rank() * share :][:share]).contiguous()
    whole = own.new_empty(share * world, *own.shape[1:])
    if hasattr(dist, "all_gather_single"):  # torch 2.13 warns about the old name
        dist.all_gather_single(whole, own)
    else:
        dist.all_gather_into_tensor(whole, own)
    return whole[: len(G)]


def clip_and_check(
    params: list[Tensor], max_norm: float, scale: float, loss_is_finite: Tensor
) -> tuple[Tensor, Tensor]:
    """Divides gradients by `scale`, clips their common norm to `max_norm` (0: no clipping), and checks them. All of it
    happens on the device.

    loss_is_finite  scalar bool
    Returns (norm before clipping, 1.0 if the loss or the norm is not finite else 0.0), scalar fp32 tensors.
    """
    gradients = [p.grad for p in params if p.grad is not None]
    if gradients[0].device.type == "cpu":  # CPUs sum serially: over a whole matrix the error is 4e-5
        norms = torch.cat([torch.linalg.vector_norm(g, dim=-1).flatten() for g in gradients])
    else:
        norms = torch.stack(torch._foreach_norm(gradients))
    wide = torch.float32 if norms.device.type == "mps" else torch.float64  # MPS has no fp64
    norm = torch.linalg.vector_norm(norms, dtype=wide).float() / scale
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / scale if max_norm else torch.ones_like(norm) / scale
    torch._foreach_mul_(gradients, factor)
    return norm, (~(torch.isfinite(norm) & loss_is_finite)).float()
