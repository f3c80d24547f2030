"""MiniMind's checkpoints: plain state dicts whose tensor names are ours already, and whose architecture lies beside
them.

Two generations differ: MiniMind2 (2025: shared experts, its own variant of YaRN) and MiniMind 3 (2026: Qwen3's layout).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.console import UserError
from common.json_file import read_json
from model.config import ModelConfig

HEADS = 8  # MiniMind2's files do not tell; it never used another number


def config_from_minimind(values: dict) -> ModelConfig:
    """From their config (a `config.json` or the attributes of their config class) to ours."""
    third = "n_routed_experts" not in values  # MiniMind 3
    moe = values.get("use_moe", False)
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    scaling = None
    if values.get("inference_rope_scaling"):
        plain = dict(rope_type="yarn", factor=16, beta_fast=32, beta_slow=1, attention_factor=1.0)
        defaults = plain if third else dict(rope_type="minimind2", factor=4, beta_fast=4, beta_slow=1)
        scaling = {**defaults, "original_max_position_embeddings": 2048}
    widths = ("intermediate_size", "moe_intermediate_size")
    return ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=head_dim,
        **{name: values[name] for name in widths if name in values},
        max_position_embeddings=values.get("max_position_embeddings", 32768),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6 if third else 1e-5),
        rope_theta=values.get("rope_theta", 1e6),
        rope_scaling=scaling,
        qk_norm=third,
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        num_experts=(values["num_experts"] if third else values["n_routed_experts"]) if moe else 0,
        num_experts_per_tok=values.get("num_experts_per_tok", 2) if moe else 2,
        num_shared_experts=values.get("n_shared_experts", 0) if moe else 0,
        norm_topk_prob=values.get("norm_topk_prob", True),
        router_aux_loss_coef=values.get("router_aux_loss_coef", 5e-4) if third else values.get("aux_loss_alpha", 0.1),
    )


def config_to_minimind(config: ModelConfig) -> dict:
    """The inverse of `config_from_minimind`: of the generation whose code computes the same. UserError: neither does,
    and why."""
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
        "max_position_embeddings rms_norm_eps rope_theta num_experts_per_tok norm_topk_prob"
    ).split()
    values = {name: getattr(config, name) for name in names}
    values |= dict(model_type="minimind", hidden_act="silu", use_moe=config.num_experts > 0)
    values |= dict(inference_rope_scaling=config.rope_scaling is not None)
    if config.qk_norm:  # MiniMind 3
        more = ("head_dim", "tie_word_embeddings", "num_experts", "moe_intermediate_size", "router_aux_loss_coef")
        values |= {name: getattr(config, name) for name in more}
    else:
        values |= dict(n_routed_experts=config.num_experts, n_shared_experts=config.num_shared_experts)
        values |= dict(scoring_func="softmax", aux_loss_alpha=config.router_aux_loss_coef)
    ours, theirs = config.to_dict(), config_from_minimind(values).to_dict()
    if not config.num_experts:  # settings of experts that there are not
        theirs |= {
            name: ours[name] for name in ours if name.endswith(("per_tok", "topk_prob", "moe_intermediate_size"))
        }
    if wrong := [f"{k} {theirs.get(k)} (it is {ours.get(k)})" for k in ours | theirs if ours.get(k) != theirs.get(k)]:
        raise UserError(f"MiniMind's code does not compute this model; it would need {', '.join(wrong)}")
    return values


def config_beside(weights: Path) -> ModelConfig | None:
    """From `<name>.json` or `config.json` beside a file of tensors; None: neither is there, or is MiniMind's."""
    for file in (weights.with_suffix(".json"), weights.with_name("config.json")):
        try:
            return config_from_minimind(read_json(file))
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return None


def config_from_state(state: Mapping[str, Tensor]) -> ModelConfig:
    """The architecture as far as tensor shapes tell it; where they do not, MiniMind's constants.

    The one thing that cannot be read off a file without q_norm is the number of heads.
    """

    def highest(pattern: str) -> int:  # 1 + the largest number in that place of a name
        return 1 + max((int(m[1]) for m in (re.search(pattern, name) for name in state) if m), default=-1)

    vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
    first = "model.layers.0."
    third = first + "self_attn.q_norm.weight" in state
    experts = highest(r"mlp\.experts\.(\d+)\.")
    width = state[first + ("mlp.experts.0." if experts else "mlp.") + "gate_proj.weight"].shape[0]
    query, key = (state[f"{first}self_attn.{x}_proj.weight"].shape[0] for x in "qk")
    head_dim = state[first + "self_attn.q_norm.weight"].shape[0] if third else query // HEADS
    head = state.get("lm_head.weight")
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=highest(r"model\.layers\.(\d+)\."),
        num_attention_heads=query // head_dim,
        num_key_value_heads=key // head_dim,
        head_dim=head_dim,
        intermediate_size=width,
        rms_norm_eps=1e-6 if third else 1e-5,
        attention_bias=first + "self_attn.q_proj.bias" in state,
        qk_norm=third,
        tie_word_embeddings=head is None or head.equal(state["model.embed_tokens.weight"]),
        num_experts=experts,
        num_experts_per_tok=1 if third else 2,
        num_shared_experts=highest(r"mlp\.shared_experts\.(\d+)\."),
        router_aux_loss_coef=5e-4 if third else 0.1,
    )


def lora_to_minimind(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The inverse of `lora_from_minimind`. MiniMind's code adds B A unscaled, to square layers and to all of them."""
    found = {}
    for name, tensor in state.items():
        layer, matrix = name.rsplit(".", 1)
        if matrix == "A" and tensor.shape[1] != state[f"{layer}.B"].shape[0]:
            raise UserError(f"MiniMind's LoRA is on square layers only (q_proj and o_proj); {layer} is not one")
        found[f"{layer}.lora.{matrix}.weight"] = tensor * scale if matrix == "B" else tensor
    return found


def lora_from_minimind(content: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]] | None:
    """(settings, tensors) of a LoRA file: `<layer>.lora.A.weight` and `.B.weight`, whose product is added unscaled.
    None for another kind of file. Files written under DDP or torch.compile carry a prefix."""
    pattern = re.compile(r"(?:module\.|_orig_mod\.)*(.+)\.lora\.([AB])\.weight")
    state = {}
    for name, tensor in content.items():
        match = pattern.fullmatch(str(name))
        if match is None:
            return None
        state[f"{match[1]}.{match[2]}"] = tensor.float()
    rank = next((tensor.shape[0] for name, tensor in state.items() if name.endswith(".A")), None)
    if rank is None:
        return None
    return dict(rank=rank, alpha=rank), state  # alpha / rank = 1
