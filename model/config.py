"""The architecture of a model: one dataclass that covers Llama, Mistral, Qwen, GLM and both MiniMind generations.

>>> ModelConfig.preset("small").hidden_size
512
>>> ModelConfig.preset("nano", vocab_size=2048, qk_norm=True)       # any setting can be changed

A setting is one line here: default, meaning, lower bound, its name in Hugging Face's `config.json`, and whether it is a
flag of train_pretrain.py. Flags, checks and model/interop/hf.py are derived from that line; what remains to be written
is the mathematics. This file does not import torch, because `--help` reads it.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from common.console import UserError
from common.options import option

# rope_type -> keys its dictionary must hold (model/rope.py has the formulas)
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "minimind2": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
}

LAYER_TYPES = ("full_attention", "sliding_attention")  # Hugging Face's words

MIXTURE = dict(num_experts=4, num_shared_experts=1)  # what --use_moe adds to a dense preset

PRESETS: dict[str, dict[str, Any]] = {
    # for CPUs: about 3M parameters, trained in minutes
    "nano": dict(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, qk_norm=True, rope_theta=1e4
    ),
    # the three sizes of MiniMind2: 25,829,888, 104,030,976 and 145,029,760 (91,945,600 active) parameters
    "small": dict(hidden_size=512, num_hidden_layers=8),
    "base": dict(hidden_size=768, num_hidden_layers=16),
    "moe": dict(hidden_size=640, num_hidden_layers=8, **MIXTURE),
}


# annotation of a setting -> what its value may be
KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "dict[str,": (dict, "a dictionary"),
}
COUNTED, MOST = ("num_hidden_layers", "num_experts", "num_shared_experts"), 10_000  # of these, one layer each is built
WIDTHS, WIDEST = ("hidden_size", "head_dim", "intermediate_size", "moe_intermediate_size"), 1_000_000


def setting(
    default: Any,
    help: str,
    *,
    at_least: int | None = None,
    hf: str | None = "",
    flag: bool = False,
    omit_default: bool = False,
) -> Any:
    """One setting of `ModelConfig`.

    at_least      smallest value allowed (None in the setting itself is not checked)
    hf            its name in `config.json`; "": the same name; None: model/interop/hf.py translates it by hand
    flag          also a flag of train_pretrain.py; not given, the preset decides
    omit_default  left out of weights files where it has its default. Versions of Sparrow older than the setting then
                  still read the models that do not use it. For every setting added from now on.
    """
    return field(
        default=default,
        metadata=dict(help=help, at_least=at_least, hf=hf, flag=flag, omit_default=omit_default),
    )


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a `CausalLM`. Impossible values raise a `UserError` that lists all of them."""

    vocab_size: int = setting(6400, "rows of the embedding", at_least=1)
    hidden_size: int = setting(512, "width of the residual stream", at_least=1, flag=True)
    num_hidden_layers: int = setting(8, "number of blocks", at_least=1, flag=True)
    num_attention_heads: int = setting(8, "query heads", at_least=1, flag=True)
    num_key_value_heads: int = setting(2, "key and value heads, each shared by some query heads", at_least=1, flag=True)
    head_dim: int = setting(None, "size of a head; None: hidden_size / num_attention_heads", at_least=1)
    intermediate_size: int = setting(
        None, "width of the feed-forward; None: 8/3 of hidden_size, rounded up to a multiple of 64", at_least=1
    )
    max_position_embeddings: int = setting(32768, "longest text it will be used on", at_least=1, flag=True)
    rms_norm_eps: float = setting(1e-5, "added to the mean square in every RMSNorm")
    rope_theta: float = setting(1e6, "base of the rotary frequencies", hf=None)
    rope_scaling: dict[str, Any] | None = setting(
        None, 'stretched RoPE: {"rope_type": "linear" | "llama3" | "yarn" | "minimind2", ...}', hf=None
    )
    attention_bias: bool = setting(False, "biases on q, k and v (Qwen2, GLM)")
    qk_norm: bool = setting(False, "RMSNorm of every query and key head (Qwen3, MiniMind 3)", hf=None)
    tie_word_embeddings: bool = setting(True, "the head shares the embedding's weight")
    num_experts: int = setting(0, "experts of each feed-forward; 0: dense", at_least=0)
    num_experts_per_tok: int = setting(2, "experts that a token is sent to")
    num_shared_experts: int = setting(0, "experts that every token passes through", at_least=0, hf=None)
    moe_intermediate_size: int = setting(None, "width of an expert; None: intermediate_size", at_least=1)
    norm_topk_prob: bool = setting(True, "the weights of a token's experts sum to 1")
    router_aux_loss_coef: float = setting(0.01, "factor of the balancing loss")
    sliding_window: int | None = setting(
        None, "keys that a query sees in a sliding layer, itself included", at_least=1, omit_default=True
    )
    layer_types: tuple[str, ...] | None = setting(
        None, "full_attention or sliding_attention for each block; None: sliding if sliding_window", omit_default=True
    )
    rotary_fraction: float = setting(
        1.0, "share of each head that RoPE rotates, its first numbers", hf="partial_rotary_factor", omit_default=True
    )
    rope_interleaved: bool = setting(
        False, "RoPE's pairs are neighbours (GLM), not half a head apart", hf=None, omit_default=True
    )
    post_norms: bool = setting(
        False, "RMSNorm of what attention and feed-forward give too (GLM-4)", hf=None, omit_default=True
    )
    shared_expert_intermediate_size: int | None = setting(
        None,
        "width of one expert that every token passes through, with a gate (Qwen2-MoE); None: there is none",
        at_least=1,
        omit_default=True,
    )
    rope_local_theta: float | None = setting(
        None,
        "rope_theta of the sliding layers, which then have no rope_scaling; None: RoPE is the same in all layers",
        hf="rope_local_base_freq",
        omit_default=True,
    )

    def __post_init__(self):
        if wrong := self._wrong_kinds():  # first: the lines below compute with them
            raise UserError("this model cannot be built: " + "; ".join(wrong))

        def default(name: str, value: Any) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        default("head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        default("intermediate_size", 64 * -(-int(self.hidden_size * 8 / 3) // 64))
        default("moe_intermediate_size", self.intermediate_size)
        if self.layer_types is not None:  # a list, where it comes from a file
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
        if problems := self._problems():
            raise UserError("this model cannot be built: " + "; ".join(problems))

    def _wrong_kinds(self) -> list[str]:
        """Values from a file may be anything."""
        found = []
        for item in fields(self):
            value, kind = getattr(self, item.name), str(item.type).partition(" ")[0]
            if value is None and item.default is None or kind not in KINDS:
                continue
            wanted, words = KINDS[kind]
            if not isinstance(value, wanted) or isinstance(value, bool) != (kind == "bool"):
                found.append(f"{item.name} must be {words}, not {value!r:.40}")
            elif kind == "float" and isinstance(value, (int, float)) and not 0 <= value < math.inf:
                found.append(f"{item.name} must be at least 0 and finite, not {value!r:.40}")
        return found

    def _problems(self) -> list[str]:
        found = [f"{name} {getattr(self, name)} is too many" for name in COUNTED if getattr(self, name) > MOST]
        found += [f"{name} {getattr(self, name)} is too wide" for name in WIDTHS if getattr(self, name) > WIDEST]
        for item in fields(self):
            value, least = getattr(self, item.name), item.metadata["at_least"]
            if None not in (value, least) and value < least:
                found.append(f"{item.name} must be at least {least}, not {value}")
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not 0 < self.rotary_fraction <= 1:
            found.append(f"rotary_fraction {self.rotary_fraction} must lie above 0 and be at most 1")
        elif self.rotary_fraction == 1 and self.head_dim % 2:
            width, heads = self.hidden_size, self.num_attention_heads
            of = f", hidden_size {width} / num_attention_heads {heads}," if self.head_dim == width // heads else ""
            found.append(f"head_dim {self.head_dim}{of} must be even (RoPE rotates pairs)")
        elif self.rotary_dim % 2 or not self.rotary_dim:
            found.append(
                f"rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} is {self.rotary_dim}, which must "
                "be even and positive (RoPE rotates pairs)"
            )
        if self.max_position_embeddings > 2**31 - 1:  # what a position, a file for llama.cpp can hold
            found.append(f"max_position_embeddings {self.max_position_embeddings:.3g} is too many")
        zero = [name for name in ("rope_theta", "rope_local_theta") if getattr(self, name) == 0]
        found += [f"{name} must be above 0" for name in zero]
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                found.append(f"layer_types names {len(self.layer_types)} of {self.num_hidden_layers} layers")
            if strange := sorted(set(self.layer_types) - set(LAYER_TYPES)):
                found.append(f"layer_types: {', '.join(strange)} is not one of {', '.join(LAYER_TYPES)}")
            if "sliding_attention" in self.layer_types and self.sliding_window is None:
                found.append("layer_types has sliding_attention, but there is no sliding_window")
        if self.rope_local_theta is not None and self.sliding_window is None:
            found.append("rope_local_theta is for layers with a sliding_window, which is not set")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            found.append(
                f"num_experts_per_tok {self.num_experts_per_tok} must lie in 1..num_experts {self.num_experts}"
            )
        return found + (_problems_of_scaling(self.rope_scaling) if self.rope_scaling is not None else [])

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many keys a query sees, itself included; None: all before it."""
        if self.layer_types is None:
            return (self.sliding_window,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @classmethod
    def preset(cls, name: str, **changes) -> ModelConfig:
        """A named size, with any field changed."""
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; a key that is not a field is an error, so no setting is silently lost."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise UserError(f"unknown model setting {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files."""
        values = asdict(self)
        for item in fields(self):
            if item.metadata["omit_default"] and values[item.name] == item.default:
                del values[item.name]
        return values


def _problems_of_scaling(scaling: dict[str, Any]) -> list[str]:
    found, kind = [], scaling.get("rope_type")
    for key, value in scaling.items():
        if key == "rope_type" or value is None:
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            found.append(f"rope_scaling's {key} must be a positive number, not {value!r:.40}")
    if kind not in ROPE_SCALINGS:
        found.append(f"rope_scaling kind {kind!r} is not one of {', '.join(ROPE_SCALINGS)}")
    elif missing := [key for key in ROPE_SCALINGS[kind] if key not in scaling]:
        found.append(f"rope_scaling of kind {kind} lacks {', '.join(missing)}")
    return found


def architecture_options() -> list[tuple[str, Any, Any]]:
    """The settings that are flags, as (name, type, field) for `dataclasses.make_dataclass`. None: not given."""
    hints, found = get_type_hints(ModelConfig), []
    for item in fields(ModelConfig):
        meta = item.metadata
        if meta["flag"]:
            within = "" if meta["at_least"] is None else f"[{meta['at_least']}, inf)"
            found.append((item.name, hints[item.name] | None, option(None, meta["help"], within=within)))
    return found
