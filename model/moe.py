"""Mixture of experts: a router sends each token to the best k of E feed-forward networks; shared experts see every
token.

Letters: N = B*T tokens, d hidden size, I expert size, E experts, k experts per token.

All experts are computed at once: tokens are sorted by expert, and `grouped_linear` multiplies each group with its
expert's weights. The time hardly grows with E, and nothing waits for the device. The balancing loss of a row depends
on that row alone (Switch Transformer, arXiv:2101.03961, eqs. 4-6; per sequence as in DeepSeek-V2, arXiv:2405.04434,
eqs. 12-14).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import FeedForward


class Experts(nn.Module):
    """E SwiGLU networks as three stacked weights. Files hold them one by one, under Hugging Face's names."""

    NAMES = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, d, I = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, I, d))
        self.up_proj = nn.Parameter(torch.empty(E, I, d))
        self.down_proj = nn.Parameter(torch.empty(E, d, I))
        self.register_state_dict_post_hook(_unstack)
        self.register_load_state_dict_pre_hook(_stack)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (N*k, d), sorted by expert; ends (E,) int32: where each expert's tokens end -> (N*k, d)."""
        gate, up, down = (getattr(self, name).to(x.dtype) for name in self.NAMES)
        hidden = F.silu(grouped_linear(x, gate, ends)) * grouped_linear(x, up, ends)  # (N*k, I)
        return grouped_linear(hidden, down, ends)


def _unstack(module: Experts, state: dict, prefix: str, _local) -> None:
    for name in Experts.NAMES:
        for e, weight in enumerate(state.pop(prefix + name)):
            state[f"{prefix}{e}.{name}.weight"] = weight


def _stack(module: Experts, state: dict, prefix: str, *_) -> None:
    for name in Experts.NAMES:
        keys = [f"{prefix}{e}.{name}.weight" for e in range(len(getattr(module, name)))]
        if all(key in state for key in keys):  # otherwise the strict load names what is missing
            state[prefix + name] = torch.stack([state.pop(key) for key in keys])


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (N, a), sorted by expert; weight (E, b, a); rows up to ends[e] belong to expert e -> (N, b).

    torch has a kernel for it, which wants rows of a multiple of 16 bytes. Compiled it takes only bf16 (torch 2.13), and
    so it is on Hopper's GPUs. On others it asks the device where the experts' rows end, and waits: there the
    products are made in blocks. On CPUs, where asking costs nothing, one expert is multiplied after the other.
    """
    half, on_cpu = x.dtype == torch.bfloat16, x.device.type == "cpu"
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if aligned and (half or on_cpu and not torch.compiler.is_compiling()) and (on_cpu or _has_grouped_mm(x.device)):
        op = getattr(F, "grouped_mm", None) or torch.ops.aten._grouped_mm  # the public name is newer than torch 2.11
        return op(x, weight.transpose(-2, -1), offs=ends)
    return _linear_by_expert(x, weight, ends) if on_cpu else linear_in_blocks(x, weight, ends)


def _has_grouped_mm(device: torch.device) -> bool:
    """Whether the grouped product is one kernel there, which does not wait for the device. Not on Blackwell, where the
    gradient of an expert without tokens is not 0 (https://github.com/pytorch/pytorch/issues/172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def linear_in_blocks(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As `grouped_linear`, with operations whose shapes follow from those of the inputs, so nothing waits.

    Each expert's rows are filled up to whole blocks, and each block is multiplied with its expert's weight. With blocks
    of a quarter of an expert's fair share of the rows, there are at most 5 E: an eighth of them is filling, on average.
    """
    rows, (E, width, inner) = len(x), weight.shape
    size = max(rows // (4 * E), 16)
    blocks = rows // size + E
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    last = ((ends - starts + size - 1) // size).cumsum(0)  # (E,): where each expert's blocks end
    first = torch.cat([last.new_zeros(1), last[:-1]])
    count = torch.arange(max(rows, blocks), device=x.device)
    owner = torch.searchsorted(ends, count[:rows].to(ends.dtype), right=True)  # (N,): the expert of each row
    place = count[:rows] - starts[owner] + first[owner] * size  # (N,): where it stands in its expert's blocks
    expert = torch.searchsorted(last, count[:blocks], right=True).clamp(max=E - 1)  # of each block
    filled = x.new_zeros(blocks * size, inner).index_copy(0, place, x).view(blocks, size, inner)
    y = torch.bmm(filled, _Repeated.apply(weight, expert).transpose(1, 2))
    return y.view(-1, width).index_select(0, place)


class _Repeated(torch.autograd.Function):
    """weight (E, b, a), expert (n,) -> (n, b, a). The gradients of an expert's blocks are summed in fp32: in bf16 each
    further one would be rounded."""

    @staticmethod
    def forward(ctx, weight: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(expert)
        ctx.experts = len(weight)
        return weight.index_select(0, expert)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (expert,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.experts, *grad.shape[1:], dtype=torch.float32)
        return total.index_add(0, expert, grad.float()).to(grad.dtype), None


# Ops of their own: the compiler does not look into them, and needs only the shapes that are registered below. Traced,
# a loop whose bounds are numbers in a tensor would break the graph at every expert.


@torch.library.custom_op("sparrow::linear_by_expert", mutates_args=())
def _linear_by_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As `grouped_linear`."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    for matrix, rows in zip(weight, _rows(ends)):
        torch.mm(x[rows], matrix.T, out=y[rows])
    return y


@torch.library.custom_op("sparrow::linear_by_expert_weight_grad", mutates_args=())
def _weight_grad(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """grad (N, b), x (N, a) -> (E, b, a); zeros for an expert without rows."""
    found = x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
    for matrix, rows in zip(found, _rows(ends)):
        torch.mm(grad[rows].T, x[rows], out=matrix)
    return found


def _rows(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops)]


@_linear_by_expert.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@_weight_grad.register_fake
def _(grad, x, ends):
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad_x = _linear_by_expert(grad, weight.transpose(-2, -1), ends) if needs_x else None
    return grad_x, _weight_grad(grad, x, ends) if needs_weight else None, None


_linear_by_expert.register_autograd(_backward, setup_context=_save_for_backward)


class MoE(nn.Module):
    """Takes the place of a dense feed-forward network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.coefficient = config.router_aux_loss_coef
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        if config.num_shared_experts:
            self.shared_experts = nn.ModuleList(
                FeedForward(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_shared_experts)
            )
        if config.shared_expert_intermediate_size:  # Qwen2-MoE's
            self.shared_expert = FeedForward(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, d) -> the same shape, and the balancing loss of each row (B,)."""
        B, T, d = x.shape
        E = self.gate.out_features
        # routing in fp32: near ties would fall differently in bf16
        probabilities = F.linear(x.float(), self.gate.weight.float()).softmax(-1)  # (B, T, E)
        weights, chosen = probabilities.topk(self.k, dim=-1)  # (B, T, k)
        if self.normalise:
            total = weights.sum(-1, keepdim=True)
            # A single weight divided by itself is 1 whatever the router says, and the router would get no gradient.
            # With the divisor held constant the value is 1 and the gradient is that of log p.
            weights = weights / (total.detach() if self.k == 1 else total)

        chosen = chosen.view(B * T * self.k)
        order = chosen.argsort(stable=True)
        # (B, E): how often each row chose each expert; bincount would wait for the GPU
        picked = (chosen.view(B, T * self.k, 1) == torch.arange(E, device=x.device)).sum(1)
        ends = picked.sum(0).cumsum(0).to(torch.int32)
        y = self.experts(x.view(B * T, d)[order // self.k], ends)  # (N*k, d), by expert
        y = torch.empty_like(y).index_copy(0, order, y)  # back in the tokens' order
        y = (y.view(B, T, self.k, d) * weights.to(y.dtype)[..., None]).sum(2)
        if hasattr(self, "shared_experts"):
            y = y + sum(expert(x) for expert in self.shared_experts)
        if hasattr(self, "shared_expert"):
            share_of_it = F.linear(x, self.shared_expert_gate.weight.to(x.dtype)).sigmoid()  # (B, T, 1)
            y = y + share_of_it * self.shared_expert(x)

        share = picked * E / (T * self.k)  # 1 for every expert when balanced
        return y, self.coefficient * (share * probabilities.mean(1)).sum(-1)
