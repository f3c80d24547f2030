"""Hugging Face's directories: `config.json` and files of weights. Most names of tensors are ours.

    config, state = load_hf("path/to/Qwen3-0.6B")

A model family is one row of FAMILIES. Names of settings are those in the metadata of `ModelConfig`. Both spellings of
RoPE are read: `rope_scaling` of transformers 4 and `rope_parameters` of 5. Tensors that hold several layers of ours
(GLM's gate_up_proj) are taken apart; `hf_tensors` puts them together again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.console import UserError
from common.json_file import read_json
from model.config import LAYER_TYPES, ModelConfig
from model.interop import chatglm
from model.interop.hf_files import open_tensors
from model.interop.minimind import config_from_minimind
from model.tensor_files import Place, StoredTensors
from model.transformer import equal_weights

# setting of ours -> its name in config.json; what is missing here is translated by hand below
NAMES: dict[str, str] = {
    item.name: item.metadata["hf"] or item.name for item in fields(ModelConfig) if item.metadata["hf"] is not None
}
PLAIN = {item.name: item.default for item in fields(ModelConfig)}  # a model without anything special
LLAMA = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "max_position_embeddings rms_norm_eps tie_word_embeddings"
).split()
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")
WINDOWS = ("sliding_window", "layer_types")


class Family(NamedTuple):
    """A model_type of transformers, by its differences from Llama."""

    architecture: str  # the class
    fixed: dict[str, Any]  # our settings that the family implies without writing them into its file
    states: tuple[str, ...]  # our settings that its file states, beyond LLAMA
    absent: dict[str, Any]  # what transformers (5.2) assumes where a file says nothing, in its names
    names: dict[str, str] = {}  # setting of ours -> its name in this family's file, where it is another than in NAMES
    fused: dict[str, tuple[str, ...]] = {}  # its layer -> those of ours that it holds, one below the other


GLM = dict(num_key_value_heads=2, head_dim=128, attention_bias=True, partial_rotary_factor=0.5, rms_norm_eps=1.5625e-07)
GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
QWEN_WINDOWS = dict(use_sliding_window=False, sliding_window=4096)
FAMILIES = {  # of two families that fit a model, the first is written
    "llama": Family("LlamaForCausalLM", {}, (), {}),
    "mistral": Family("MistralForCausalLM", {}, ("sliding_window",), dict(num_key_value_heads=8, sliding_window=4096)),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        dict(attention_bias=True),
        WINDOWS,
        dict(num_key_value_heads=32, max_window_layers=28, **QWEN_WINDOWS),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        dict(qk_norm=True),
        WINDOWS,
        dict(num_key_value_heads=32, head_dim=128, max_window_layers=28, **QWEN_WINDOWS),
    ),
    "ministral": Family("MinistralForCausalLM", {}, WINDOWS, dict(num_key_value_heads=8, sliding_window=4096)),
    "glm": Family(
        "GlmForCausalLM",
        dict(rope_interleaved=True),
        ("attention_bias", "rotary_fraction"),
        GLM,
        fused=GATE_UP,
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        dict(rope_interleaved=True, post_norms=True),
        ("attention_bias", "rotary_fraction"),
        GLM,
        fused=GATE_UP,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        dict(qk_norm=True),
        (*EXPERTS, "sliding_window"),
        dict(
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=False,
            router_aux_loss_coef=0.001,
            **QWEN_WINDOWS,
        ),
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {},
        (*EXPERTS, "shared_expert_intermediate_size", "attention_bias"),
        dict(
            num_key_value_heads=16,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            norm_topk_prob=False,
            router_aux_loss_coef=0.001,
            qkv_bias=True,
        ),
        names=dict(attention_bias="qkv_bias"),
    ),
}
DIFFERENCES = (  # settings in which families differ
    "attention_bias",
    "qk_norm",
    "num_shared_experts",
    "sliding_window",
    "rotary_fraction",
    "rope_interleaved",
    "post_norms",
    "shared_expert_intermediate_size",
    "rope_local_theta",
)
ROPE_KEYS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """The architecture in the content of a `config.json`. UserError names what we do not compute."""
    name = values.get("model_type")
    if name == "chatglm":
        return chatglm.config_from_chatglm(values)
    if name not in FAMILIES:
        known = ", ".join([*FAMILIES, "chatglm"])
        raise UserError(f"config.json: model_type {name!r} is not supported, only {known}")
    family = FAMILIES[name]
    if "num_local_experts" in values:  # transformers 5 writes Mixtral's name
        values = {**values, "num_experts": values["num_local_experts"]}
    _refuse_unsupported(values, family)
    absent = dict(tie_word_embeddings=False, rms_norm_eps=1e-6, num_key_value_heads=values.get("num_attention_heads"))
    # null is "not stated", except for a window, where it is "none"
    stated = {key: value for key, value in values.items() if value is not None or key == "sliding_window"}
    values = absent | family.absent | stated
    if chunks := values.get("dual_chunk_attention_config"):  # Qwen2.5-1M: within a chunk, attention is as everywhere
        chunk = chunks["chunk_size"] - chunks["local_size"]
        values["max_position_embeddings"] = min(values["max_position_embeddings"], chunk)
    plain = {ours: values[theirs] for ours, theirs in _plain_names(family).items() if theirs in values}
    return ModelConfig(**(plain | family.fixed | _read_windows(values, family) | _read_rope(values, family)))


def _plain_names(family: Family) -> dict[str, str]:
    """Setting of ours -> its name in the file, for those that need no translation."""
    names = NAMES | family.names
    return {name: names[name] for name in NAMES if name in (*LLAMA, *family.states) and name not in WINDOWS}


def _refuse_unsupported(values: dict[str, Any], family: Family) -> None:
    off = ["mlp_bias", "mlp_only_layers"]  # must be off or absent
    if "attention_bias" not in family.states or "attention_bias" in family.names:
        off.append("attention_bias")  # in Llama's files it means one on o_proj too
    if "sliding_window" not in family.states:
        off.append("use_sliding_window")
    unsupported = [f"{key}={values[key]!r}" for key in off if values.get(key)]
    if (step := values.get("decoder_sparse_step", 1)) != 1:
        unsupported.append(f"decoder_sparse_step={step}")
    if (activation := values.get("hidden_act", "silu")) != "silu":
        unsupported.append(f"hidden_act={activation!r}")
    if quantised := values.get("quantization_config"):
        unsupported.append(f"weights quantised by {quantised.get('quant_method', 'another project')}")
    if unsupported:
        raise UserError(f"config.json: not supported: {', '.join(unsupported)}")


def _read_windows(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """Which layers have a sliding window: as `layer_types` lists them, else Qwen's from max_window_layers on, else all.
    Qwen's files state a window even where use_sliding_window says that there is none."""
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if "sliding_window" not in family.states or window is None:
        return {}
    if "layer_types" not in family.states:
        return dict(sliding_window=window)
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if kinds is None:
        full = min(values.get("max_window_layers", 0), layers)
        kinds = LAYER_TYPES[:1] * full + LAYER_TYPES[1:] * (layers - full)
    return dict(sliding_window=window, layer_types=tuple(kinds))


def _read_rope(values: dict[str, Any], family: Family) -> dict[str, Any]:
    rope = values.get("rope_parameters") or {}
    local = None
    if "full_attention" in rope:  # transformers 5, where RoPE differs between layers: one dictionary for each type
        rope, local = rope["full_attention"], rope.get("sliding_attention")
    scaling = {**(values.get("rope_scaling") or rope)}
    theta = scaling.pop("rope_theta", None)
    theta = values.get("rope_theta", 10000.0) if theta is None else theta
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    found = dict(rope_theta=theta)
    if local:
        scaled = {key: value for key, value in local.items() if key != "rope_theta" and value not in ("default", None)}
        if scaled:
            raise UserError(f"config.json: RoPE scaling of sliding layers not supported: {scaled}")
        found["rope_local_theta"] = local["rope_theta"]
    if "rotary_fraction" in family.states:
        share = NAMES["rotary_fraction"]
        fraction = scaling.pop(share, None)
        found["rotary_fraction"] = values.get(share, 1.0) if fraction is None else fraction
    harmless = dict(truncate=True, finetuned=True, partial_rotary_factor=1.0)
    scaling = {key: value for key, value in scaling.items() if value is not None and harmless.get(key) != value}
    if kind == "dynamic":  # frequencies change beyond max_position_embeddings, which no text here is longer than
        kind, scaling = "default", {}
    if kind == "yarn":
        scaling = _with_attention_factor(scaling)
    if strange := [f"{key}={value!r}" for key, value in scaling.items() if key not in ROPE_KEYS]:
        raise UserError(f"config.json: RoPE scaling not supported: {', '.join(strange)}")
    if kind == "yarn":
        trained = scaling.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        factor = scaling.get("factor")
        if isinstance(factor, (int, float)) and math.isfinite(factor):
            # Qwen2.5's files state the trained length as the longest one
            found["max_position_embeddings"] = int(factor * trained)
    return found | dict(rope_scaling=None if kind == "default" else {"rope_type": kind, **scaling})


def _with_attention_factor(scaling: dict[str, Any]) -> dict[str, Any]:
    """YaRN's temperature as one number where a file gives DeepSeek's two."""
    scaling = dict(scaling)
    mscale, all_dim = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    if mscale and all_dim and "attention_factor" not in scaling:
        grown = 0.1 * math.log(max(scaling["factor"], 1))
        scaling["attention_factor"] = (grown * mscale + 1) / (grown * all_dim + 1)
    return scaling


def load_hf(directory: str | Path) -> tuple[ModelConfig, StoredTensors]:
    """(architecture, tensors, still in their files) of a directory written by `save_pretrained`."""
    directory = Path(directory)
    values = read_json(directory / "config.json")
    try:
        if not isinstance(values, dict):
            raise UserError(f"config.json: holds a {type(values).__name__}, not the settings of a model")
        config = (config_from_minimind if values.get("model_type") == "minimind" else config_from_hf)(values)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{directory / 'config.json'}: a setting is missing or of another kind ({error})") from None
    state = our_tensors(config, values["model_type"], open_tensors(directory))
    if config.tie_word_embeddings and "lm_head.weight" in state and "model.embed_tokens.weight" in state:
        if not equal_weights(state["lm_head.weight"], state["model.embed_tokens.weight"]):
            # as transformers 5 does: a head that was trained on its own counts more than the flag
            config = replace(config, tie_word_embeddings=False)
    return config, state


def our_tensors(config: ModelConfig, model_type: str, state: StoredTensors) -> StoredTensors:
    """A family's tensors under our names. Nothing is read."""
    fused = chatglm.FUSED if model_type == "chatglm" else {}
    if model_type in FAMILIES:
        fused = FAMILIES[model_type].fused
    found: dict[str, Place | Tensor] = {}
    for name, tensor in state.places.items():
        ours = chatglm.our_name(name) if model_type == "chatglm" else name
        # frequencies of RoPE, a buffer in Llama 2's directories, follow from config.json
        if ours is not None and not ours.endswith("rotary_emb.inv_freq"):
            found |= split_fused(config, fused, ours, tensor)
    return StoredTensors(found)


def split_fused(
    config: ModelConfig, fused: dict[str, tuple[str, ...]], name: str, tensor: Place | Tensor
) -> dict[str, Place | Tensor]:
    """One tensor of a file -> {our name: tensor}. A fused layer's weight or bias is cut into rows."""
    for theirs, ours in fused.items():
        before, found, after = name.partition(f".{theirs}.")
        if found:
            sizes = [layer_rows(config, layer) for layer in ours]
            if sum(sizes) != tensor.shape[0]:
                rows = " + ".join(map(str, sizes))
                raise UserError(f"{name}: has {tensor.shape[0]} rows, but config.json says {rows}")
            ends = list(accumulate(sizes))
            pieces = [tensor[end - size : end] for size, end in zip(sizes, ends)]
            return {f"{before}.{layer}.{after}": piece for layer, piece in zip(ours, pieces)}
    return {name: tensor}


def layer_rows(config: ModelConfig, layer: str) -> int:
    """Outputs of one of our linear layers."""
    key_width = config.num_key_value_heads * config.head_dim
    return dict(
        q_proj=config.num_attention_heads * config.head_dim,
        k_proj=key_width,
        v_proj=key_width,
        o_proj=config.hidden_size,
        gate_proj=config.intermediate_size,
        up_proj=config.intermediate_size,
        down_proj=config.hidden_size,
    )[layer.rpartition(".")[2]]


def hf_tensors(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of the family that `config_to_hf` writes."""
    found = dict(state)
    for theirs, ours in FAMILIES[config_to_hf(config)["model_type"]].fused.items():
        for name in state:
            before, is_first, after = name.partition(f".{ours[0]}.")
            if is_first:
                pieces = [found.pop(f"{before}.{layer}.{after}") for layer in ours]
                found[f"{before}.{theirs}.{after}"] = torch.cat(pieces)
    return found


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a `config.json`, for the family of transformers that computes the same."""
    mixture = config.num_experts > 0
    candidates = {name: family for name, family in FAMILIES.items() if ("num_experts" in family.states) == mixture}
    misfits = {name: _misfits(config, family) for name, family in candidates.items()}
    name = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[name]:
        raise UserError(f"transformers has no family for this model; {name} would need {', '.join(misfits[name])}")
    if config.rope_scaling and config.rope_scaling["rope_type"] == "minimind2":
        raise UserError("transformers has no family with MiniMind2's RoPE scaling")
    family = FAMILIES[name]
    return dict(
        architectures=[family.architecture],
        model_type=name,
        **{theirs: getattr(config, ours) for ours, theirs in _plain_names(family).items()},
        **_write_windows(config, family),
        hidden_act="silu",
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        torch_dtype="float32",
    )


def _misfits(config: ModelConfig, family: Family) -> list[str]:
    """What would have to be different in `config` for this family to compute the same."""
    found = []
    for name in DIFFERENCES:
        value, needed = getattr(config, name), family.fixed.get(name, PLAIN[name])
        if name not in family.states and value != needed:
            found.append(f"{name} {needed} (it is {value})")
    if "shared_expert_intermediate_size" in family.states and not config.shared_expert_intermediate_size:
        found.append("a shared expert with a gate")
    if "layer_types" not in family.states and len(set(config.windows)) > 1:
        found.append("the same window in all layers")
    return found


def _write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    """For older readers also as max_window_layers, where the layers without a window are the first ones."""
    switch = "use_sliding_window" in family.absent  # Qwen's, off where it is absent
    if not any(config.windows):  # Mistral's families have a window where their file says nothing
        return dict(sliding_window=None) if "sliding_window" in family.absent and not switch else {}
    found: dict[str, Any] = dict(sliding_window=config.sliding_window)
    if switch:
        found["use_sliding_window"] = True
    if "layer_types" in family.states:
        found["layer_types"] = [LAYER_TYPES[window is not None] for window in config.windows]
        full = config.windows.count(None)
        if None not in config.windows[full:]:
            found["max_window_layers"] = full
    return found
