"""GGUF, the one-file format of llama.cpp, ollama and LM Studio. Files are written by the package `gguf`.

    write_gguf("out/small.gguf", checkpoint, tokenizer, dtype="q8_0")
    state = read_gguf("out/small.gguf", checkpoint.config)      # under our names again, fp32

An architecture of llama.cpp is one row of ARCHITECTURES (github.com/ggml-org/llama.cpp, src/models/). Some rotate
neighbouring numbers of a head ("NORM"), while our q and k are laid out for halves ("NEOX"): for those the rows of q and
k are put into their order, as llama.cpp's own converter does. Norms, biases and routers stay fp32, as it wants them.

Two things are stored otherwise than in our files: the experts of a layer are one tensor, and shared experts are one
wide expert, which computes the same.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.console import Progress, UserError
from model.config import ModelConfig
from model.interop.gguf_tokenizer import add_tokenizer
from model.rope import inverse_frequencies
from model.tensor_files import StoredTensors
from tokenizer.text import Tokenizer

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # ours -> the format's


class Architecture(NamedTuple):
    """What a model must be like for llama.cpp to compute the same. A setting that is not named must be off."""

    needs: dict[str, Any]
    may: tuple[str, ...] = ()  # settings that may have any value
    norm_rope: bool = False  # rotates neighbours
    free_frequencies: bool = False  # reads rope_freqs.weight: any RoPE can be expressed
    needs_head: bool = False  # has a head of its own, also where ours is tied
    gate_in_up: bool = False  # gate and up are one tensor, called ffn_up
    fused_qkv: bool = False  # q, k and v are one tensor, called attn_qkv


MIXTURES = {  # of two that fit, the first is taken
    "llama": Architecture(dict(norm_topk_prob=True), norm_rope=True, free_frequencies=True),  # Mixtral
    "qwen3moe": Architecture(dict(qk_norm=True, norm_topk_prob=True)),
    "qwen2moe": Architecture(
        dict(norm_topk_prob=False, attention_bias=True), ("shared_expert_intermediate_size",), needs_head=True
    ),
    "bailingmoe": Architecture({}, ("num_shared_experts", "norm_topk_prob"), norm_rope=True, needs_head=True),
    "bailingmoe2": Architecture(
        dict(qk_norm=True), ("num_shared_experts", "norm_topk_prob"), needs_head=True, fused_qkv=True
    ),
}
DENSE = {
    "llama": Architecture({}, norm_rope=True, free_frequencies=True),
    "qwen2": Architecture(dict(attention_bias=True)),
    "qwen3": Architecture(dict(qk_norm=True)),
    "glm4": Architecture(
        dict(rope_interleaved=True, post_norms=True),
        ("attention_bias", "rotary_fraction"),
        norm_rope=True,
        gate_in_up=True,
    ),
}
SETTINGS = (  # in which architectures differ
    "attention_bias",
    "qk_norm",
    "rotary_fraction",
    "rope_interleaved",
    "post_norms",
    "rope_local_theta",
    "num_shared_experts",
    "shared_expert_intermediate_size",
)
OFF = {name: ModelConfig.__dataclass_fields__[name].default for name in SETTINGS}
GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
EXPERT = re.compile(r"mlp\.(experts|shared_experts|shared_expert)\.(?:\d+\.)?(gate|up|down)_proj")
FULL_PRECISION = re.compile(r".*(norm|\.bias|ffn_gate_inp|ffn_gate_inp_shexp|rope_freqs)(\.weight)?")


# ---- which architecture


def architecture_of(config: ModelConfig) -> tuple[str, Architecture]:
    """The architecture of llama.cpp that computes the same. UserError: there is none, and why."""
    table = MIXTURES if config.num_experts else DENSE
    misfits = {name: _misfits(config, row) for name, row in table.items()}
    name = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[name]:
        raise UserError(f"llama.cpp has no architecture for this model; {name} would need {', '.join(misfits[name])}")
    return name, table[name]


def _misfits(config: ModelConfig, row: Architecture) -> list[str]:
    """What would have to be different in `config`."""
    wanted = {name: value for name, value in (OFF | row.needs).items() if name not in row.may}
    if not config.num_experts:
        wanted.pop("norm_topk_prob", None)
    found = [f"{k} {v} (it is {getattr(config, k)})" for k, v in wanted.items() if getattr(config, k) != v]
    for name in ("num_shared_experts", "shared_expert_intermediate_size"):
        if name in row.may and not getattr(config, name):
            found.append("a shared expert")
    kind = config.rope_scaling["rope_type"] if config.rope_scaling else None
    if kind in ("llama3", "minimind2") and not row.free_frequencies:
        found.append(f"another RoPE scaling than {kind}")
    return found


# ---- settings


def metadata(config: ModelConfig, row: Architecture) -> dict[str, Any]:
    """Key of the file, without the architecture's name in front -> value."""
    windows = [window for window in config.windows if window]
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        # llama.cpp knows no window in these architectures: up to its length, nothing is hidden by one
        "context_length": min([config.max_position_embeddings, *windows]),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.moe_intermediate_size if config.num_experts else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    if config.num_experts:
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": 1.0,
            "expert_gating_func": 1,  # softmax
            "leading_dense_block_count": 0,
        }
    if config.num_shared_experts:
        found["expert_shared_count"] = config.num_shared_experts
    if width := config.shared_expert_intermediate_size:
        found["expert_shared_feed_forward_length"] = width
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
    if scaling.get("rope_type") == "yarn":
        usual = 0.1 * math.log(scaling["factor"]) + 1.0  # what llama.cpp multiplies with anyway
        found |= {
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.attn_factor": inverse_frequencies(config)[1] / usual,
            "rope.scaling.yarn_beta_fast": float(scaling.get("beta_fast", 32)),
            "rope.scaling.yarn_beta_slow": float(scaling.get("beta_slow", 1)),
        }
    return found


def rope_divisors(config: ModelConfig) -> Tensor | None:
    """(R/2,) what each frequency is divided by, where "linear" and "yarn" do not say it."""
    if not config.rope_scaling or config.rope_scaling["rope_type"] not in ("llama3", "minimind2"):
        return None
    plain = 1.0 / config.rope_theta ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim)
    return plain / inverse_frequencies(config)[0]


# ---- tensors


class Stored(NamedTuple):
    """A tensor of the file, by those of ours that it holds."""

    names: list[str]
    how: str  # how they are put together: "" (there is one), "stack", "rows" or "columns"
    heads: int = 0  # whose rows are put into the order of neighbours; 0: they stay
    sizes: tuple[int, ...] = ()  # rows of each, where they differ

    def join(self, state: Mapping[str, Tensor]) -> Tensor:
        pieces = [state[name] for name in self.names]
        if self.how == "stack":
            return torch.stack(pieces)
        if self.how:
            return torch.cat(pieces, dim=0 if self.how == "rows" else 1)
        return to_neighbours(pieces[0], self.heads) if self.heads else pieces[0]

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`."""
        if self.how == "stack":
            return dict(zip(self.names, tensor.unbind()))
        if self.how:
            axis = 0 if self.how == "rows" else 1
            return dict(zip(self.names, tensor.split(self.sizes or tensor.shape[axis] // len(self.names), dim=axis)))
        return {self.names[0]: to_halves(tensor, self.heads) if self.heads else tensor}


def to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, (H * D, ...): within each head, 0, D/2, 1, D/2 + 1, ... of their order before."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def layout(config: ModelConfig, names: list[str]) -> dict[str, Stored]:
    """Name in the file -> which of our tensors it holds. names: ours, a tied head not among them."""
    _, row = architecture_of(config)
    permute = row.norm_rope and not config.rope_interleaved
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    rows = tuple(config.head_dim * n for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2))
    found: dict[str, Stored] = {}
    for name in sorted(names, key=_in_order):
        layer, kind = name.rpartition(".")[::2]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer)
        if match is None:
            found[f"{GLOBAL[layer]}.{kind}"] = Stored([name], "")
            continue
        number, layer = match.groups()
        place, how = _place(layer, row)
        key = f"blk.{number}.{place}.{kind}"
        if key in found:
            found[key].names.append(name)
        else:
            sizes = rows if place == "attn_qkv" else ()
            found[key] = Stored([name], how, heads.get(layer, 0) if permute else 0, sizes)
    if row.needs_head and config.tie_word_embeddings:
        found["output.weight"] = Stored(["model.embed_tokens.weight"], "")
    return found


def _place(layer: str, row: Architecture) -> tuple[str, str]:
    """A layer of a block -> (its name in the file, how it is put together with others of that name)."""
    if expert := EXPERT.fullmatch(layer):
        group, matrix = expert.groups()
        if group == "experts":
            return f"ffn_{matrix}_exps", "stack"
        return f"ffn_{matrix}_shexp", "columns" if matrix == "down" else "rows"
    if row.gate_in_up and layer in ("mlp.gate_proj", "mlp.up_proj"):
        return "ffn_up", "rows"  # gate first, then up
    if row.fused_qkv and layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        return "attn_qkv", "rows"
    return LAYER[layer], ""


def _in_order(name: str) -> list:
    """Sorts expert 10 after expert 9, q before k and v, gate before up."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.replace("q_proj", "a_proj"))]


# ---- writing and reading


def write_gguf(
    path: Path | str,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    dtype: str = "float16",
) -> list[str]:
    """Writes one file, tensor by tensor -> lines to print. dtype: a key of DTYPES."""
    gguf, tensors = package(), state if isinstance(state, StoredTensors) else StoredTensors(state)
    architecture, row = architecture_of(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(Path(path).stem)  # shown by programs
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    types = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata(config, row).items():
        types[type(value)](f"{architecture}.{key}", value)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "float32" else f"MOSTLY_{DTYPES[dtype]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_tokenizer(writer, tokenizer, config.vocab_size)

    plan = layout(config, list(tensors))
    extra = {} if (divisors := rope_divisors(config)) is None else {"rope_freqs.weight": divisors}
    kinds, odd = {}, []
    for key, stored in {**{key: None for key in extra}, **plan}.items():
        shape = extra[key].shape if stored is None else _shape(stored, tensors)
        kinds[key] = gguf.GGMLQuantizationType.F32 if FULL_PRECISION.fullmatch(key) else kind
        if kinds[key] is kind and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kinds[key] = gguf.GGMLQuantizationType.F16
            odd.append(key)
        stored_shape = gguf.quant_shape_to_byte_shape(shape, kinds[key])
        writer.add_tensor_info(key, stored_shape, np.dtype(np.uint8), math.prod(stored_shape), raw_dtype=kinds[key])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        progress = Progress(f"writing {Path(path).name.lstrip('.')}", len(kinds), " tensors")
        for key in kinds:
            tensor = extra[key] if key in extra else plan[key].join(tensors)
            writer.write_tensor_data(
                gguf.quantize(tensor.detach().float().contiguous().numpy(), kinds[key]).view(np.uint8)
            )
            progress.advance(1)
        progress.close()
        writer.flush()
    except OSError as error:  # of numpy's `tofile`: without a number where the disk is full
        number = error.errno or errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from None
    finally:
        writer.close()
    if odd:
        notes.append(f"{len(odd)} tensors whose rows are no multiple of 32 are float16: {odd[0]}, ...")
    if (length := metadata(config, row)["context_length"]) < config.max_position_embeddings:
        notes.append(f"context length {length:,}: beyond its sliding window the model would compute something else")
    return notes


def _shape(stored: Stored, tensors: StoredTensors) -> tuple[int, ...]:
    shapes = [tuple(tensors.places[name].shape) for name in stored.names]
    if stored.how == "stack":
        return len(shapes), *shapes[0]
    if stored.how:
        axis = 0 if stored.how == "rows" else 1
        return tuple(sum(s[i] for s in shapes) if i == axis else size for i, size in enumerate(shapes[0]))
    return shapes[0]


def read_gguf(path: Path | str, config: ModelConfig, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a file that `write_gguf` wrote, under our names, fp32. UserError names what is missing."""
    state: dict[str, Tensor] = {}
    plan, found = layout(config, names), dict(_tensors(path))
    if strange := sorted(plan.keys() ^ (found.keys() - {"rope_freqs.weight"})):
        raise UserError(f"{path}: {strange[0]} is missing, or does not belong to this model")
    for key, stored in plan.items():
        if stored.names[0] not in state:  # the copy of a tied head: it was read already
            state |= stored.split(found[key])
    return state


def _tensors(path: Path | str) -> Iterator[tuple[str, Tensor]]:
    gguf = package()
    for item in gguf.GGUFReader(path).tensors:
        shape = [int(size) for size in reversed(item.shape)]  # the file lists the last dimension first
        values = gguf.dequantize(item.data, item.tensor_type)
        yield item.name, torch.from_numpy(np.array(values, dtype=np.float32)).view(shape)  # a copy: the file is mapped


def package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF needs the package gguf: pip install gguf") from None
    return gguf
