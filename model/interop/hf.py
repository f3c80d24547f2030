"""Hugging Face's directories: `config.json` and `*.safetensors`. Tensor names need no translation, settings a few.

    config, state = load_hf("path/to/Qwen3-0.6B")

Both spellings are read: `rope_scaling` of transformers 4 and `rope_parameters` of 5.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from common.console import UserError
from model.config import ModelConfig
from model.interop.minimind import config_from_minimind

SAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "max_position_embeddings rms_norm_eps tie_word_embeddings num_experts num_experts_per_tok moe_intermediate_size "
    "norm_topk_prob router_aux_loss_coef"
).split()
# model_type -> what the family fixes without writing it into its file
FAMILIES = {
    "llama": {},
    "qwen2": dict(attention_bias=True),
    "qwen3": dict(qk_norm=True),
    "qwen3_moe": dict(qk_norm=True),
}
# what transformers (5.2) takes where a file says nothing; llama's key/value heads: as many as query heads
ABSENT = {
    "llama": {},
    "qwen2": dict(num_key_value_heads=32),
    "qwen3": dict(num_key_value_heads=32, head_dim=128),
    "qwen3_moe": dict(
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=False,
        router_aux_loss_coef=0.001,
    ),
}
ROPE_KEYS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)


def config_from_hf(values: dict) -> ModelConfig:
    """From the content of a `config.json`."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"config.json: model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
    plain = ("use_sliding_window", "mlp_bias", "mlp_only_layers", "attention_bias")  # must be off or absent
    unsupported = [f"{key}={values[key]!r}" for key in plain if values.get(key)]
    unsupported += [f"decoder_sparse_step={step}" for step in (values.get("decoder_sparse_step", 1),) if step != 1]
    if values.get("hidden_act", "silu") != "silu":
        unsupported.append(f"hidden_act={values['hidden_act']!r}")
    if unsupported:
        raise UserError(f"config.json: not supported: {', '.join(unsupported)}")
    rope = values.get("rope_parameters") or {}
    scaling = {**(values.get("rope_scaling") or rope)}
    theta = scaling.pop("rope_theta", None) or values.get("rope_theta", 10000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    harmless = dict(truncate=True, finetuned=True, partial_rotary_factor=1.0)
    scaling = {key: value for key, value in scaling.items() if value is not None and harmless.get(key) != value}
    if strange := [f"{key}={value!r}" for key, value in scaling.items() if key not in ROPE_KEYS]:
        raise UserError(f"config.json: RoPE scaling not supported: {', '.join(strange)}")
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    if "num_local_experts" in values:  # transformers 5 writes Mixtral's name
        values = {**values, "num_experts": values["num_local_experts"]}
    absent = dict(tie_word_embeddings=False, rms_norm_eps=1e-6, num_key_value_heads=values.get("num_attention_heads"))
    return ModelConfig(
        **absent | ABSENT[family] | {key: values[key] for key in SAME if values.get(key) is not None},
        **FAMILIES[family],
        rope_theta=theta,
        rope_scaling=None if kind == "default" else {"rope_type": kind, **scaling},
    )


def load_hf(directory: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(architecture, state dict) of a directory written by `save_pretrained`."""
    from safetensors.torch import load_file

    directory = Path(directory)
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = (config_from_minimind if values.get("model_type") == "minimind" else config_from_hf)(values)
    except json.JSONDecodeError as error:
        raise UserError(f"{directory / 'config.json'}:{error.lineno}: {error.msg}") from None
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no *.safetensors beside config.json")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_file(file))
        except Exception as error:  # safetensors has its own exception type
            raise UserError(f"{file}: not a readable safetensors file ({error})") from None
    return config, state


def config_to_hf(config: ModelConfig) -> dict:
    """The content of a `config.json`, for the family of transformers that computes the same."""
    plain = not config.attention_bias and not config.qk_norm
    if config.num_experts:
        family, name = "qwen3_moe", "Qwen3MoeForCausalLM"
    elif config.qk_norm:
        family, name = "qwen3", "Qwen3ForCausalLM"
    else:
        family, name = ("llama", "LlamaForCausalLM") if plain else ("qwen2", "Qwen2ForCausalLM")
    scaling = config.rope_scaling
    strange = {
        "q/k norms together with biases": config.qk_norm and config.attention_bias,
        "experts without q/k norms": config.num_experts and not config.qk_norm,
        "shared experts": config.num_shared_experts,
        "MiniMind2's RoPE scaling": scaling and scaling["rope_type"] == "minimind2",
    }
    if reasons := [name for name, present in strange.items() if present]:
        raise UserError(f"transformers has no family with {', '.join(reasons)}")
    values = {key: getattr(config, key) for key in SAME}
    if not config.num_experts:
        experts = ("num_experts", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")
        values = {key: value for key, value in values.items() if not key.startswith(experts)}
    return dict(
        architectures=[name],
        model_type=family,
        **values,
        hidden_act="silu",
        rope_theta=config.rope_theta,
        rope_scaling=scaling,
        torch_dtype="float32",
    )
