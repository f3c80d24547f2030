"""The shape of a model: one dataclass that covers Llama, Qwen2, Qwen3, Qwen3-MoE and both MiniMind generations.

>>> ModelConfig.preset("small").hidden_size
512
>>> ModelConfig.preset("nano", vocab_size=2048, qk_norm=True)       # any field can be changed

Field names are those of Hugging Face's `config.json`, so that a file written by either side can be read by the other.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any

from common.console import UserError

# rope_type -> keys its dictionary must hold (model/rope.py has the formulas)
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "minimind2": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
}

PRESETS: dict[str, dict[str, Any]] = {
    # for CPUs: about 3M parameters, trained in minutes
    "nano": dict(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, qk_norm=True, rope_theta=1e4
    ),
    # the three sizes of MiniMind2: 25,829,888, 104,030,976 and 145,029,760 (91,945,600 active) parameters
    "small": dict(hidden_size=512, num_hidden_layers=8),
    "base": dict(hidden_size=768, num_hidden_layers=16),
    "moe": dict(hidden_size=640, num_hidden_layers=8, num_experts=4, num_shared_experts=1),
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a `CausalLM`. `None` in head_dim, intermediate_size, moe_intermediate_size means: by the usual
    rule."""

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int | None = None  # hidden_size / num_attention_heads
    intermediate_size: int | None = None  # 8/3 of hidden_size, rounded up to a multiple of 64
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "linear" | "llama3" | "yarn" | "minimind2", ...}
    attention_bias: bool = False  # on q, k and v (Qwen2)
    qk_norm: bool = False  # RMSNorm of every query and key head (Qwen3, MiniMind 3)
    tie_word_embeddings: bool = True
    num_experts: int = 0  # 0 = dense
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    moe_intermediate_size: int | None = None  # intermediate_size
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01

    def __post_init__(self):
        derived = dict(
            head_dim=self.hidden_size // max(self.num_attention_heads, 1),
            intermediate_size=64 * -(-int(self.hidden_size * 8 / 3) // 64),
        )
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.moe_intermediate_size is None:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)
        if problems := self._problems():
            raise UserError("this model cannot be built: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        found = [
            f"{name} must be positive, not {getattr(self, name)}"
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "intermediate_size",
                "moe_intermediate_size",
                "max_position_embeddings",
            )
            if getattr(self, name) < 1
        ]
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            found.append(f"head_dim {self.head_dim} must be even (rotary embedding turns pairs)")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            found.append(
                f"num_experts_per_tok {self.num_experts_per_tok} must lie in 1..num_experts {self.num_experts}"
            )
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            if kind not in ROPE_SCALINGS:
                found.append(f"rope_scaling kind {kind!r} is not one of {', '.join(ROPE_SCALINGS)}")
            elif missing := [key for key in ROPE_SCALINGS[kind] if key not in self.rope_scaling]:
                found.append(f"rope_scaling of kind {kind} lacks {', '.join(missing)}")
        return found

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
        return asdict(self)
