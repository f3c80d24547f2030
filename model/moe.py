"""Mixture of experts: a router sends each token to the best k of E feed-forward networks; shared experts see every
token.

Letters: N = B*T tokens, d hidden size, I expert size, E experts, k experts per token.

All experts are computed at once: tokens are sorted by expert, and `grouped_mm` multiplies each group with its expert's
weights. The time does not grow with E, and nothing waits for the device. The balancing loss of a row depends on that
row alone (Switch Transformer, arXiv:2101.03961, eqs. 4-6; per sequence as in DeepSeek-V2, arXiv:2405.04434, eqs.
12-14).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


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
        gate, up, down = (getattr(self, name).to(x.dtype).transpose(-2, -1) for name in self.NAMES)
        hidden = F.silu(grouped_mm(x, gate, ends)) * grouped_mm(x, up, ends)  # (N*k, I)
        return grouped_mm(hidden, down, ends)


def _unstack(module: Experts, state: dict, prefix: str, _local) -> None:
    for name in Experts.NAMES:
        for e, weight in enumerate(state.pop(prefix + name)):
            state[f"{prefix}{e}.{name}.weight"] = weight


def _stack(module: Experts, state: dict, prefix: str, *_) -> None:
    for name in Experts.NAMES:
        keys = [f"{prefix}{e}.{name}.weight" for e in range(len(getattr(module, name)))]
        if all(key in state for key in keys):  # otherwise the strict load names what is missing
            state[prefix + name] = torch.stack([state.pop(key) for key in keys])


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (N, a) @ weight (E, a, b), rows up to ends[e] with expert e -> (N, b)."""
    op = getattr(F, "grouped_mm", None) or torch._grouped_mm  # the public name is newer than torch 2.11
    return op(x, weight, offs=ends)


class MoE(nn.Module):
    """Takes the place of a dense feed-forward network."""

    def __init__(self, config: ModelConfig, dense):
        super().__init__()
        self.k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.coefficient = config.router_aux_loss_coef
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        if config.num_shared_experts:
            self.shared_experts = nn.ModuleList(
                dense(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_shared_experts)
            )
        if config.shared_expert_intermediate_size:  # Qwen2-MoE's
            self.shared_expert = dense(config.hidden_size, config.shared_expert_intermediate_size)
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
        picked = chosen.view(B, T * self.k, 1) == torch.arange(
            E, device=x.device
        )  # not bincount: it would wait for the GPU
        picked = picked.sum(1)  # (B, E): how often each row chose each expert
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
