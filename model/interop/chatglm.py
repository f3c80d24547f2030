"""ChatGLM2 and 3: the settings and tensors of their own code (`modeling_chatglm.py`), which no class of transformers
reads. The mathematics is that of Hugging Face's `glm`, so a model that was read here is written in that layout.

A layer's query_key_value holds q, k and v, its dense_h_to_4h gate and up.
"""

from __future__ import annotations

from typing import Any

from common.console import UserError
from model.config import ModelConfig

ON = ("rmsnorm", "post_layer_norm", "original_rope")  # must be on or absent
OFF = (  # must be off or absent
    "add_bias_linear",
    "apply_residual_connection_post_layernorm",
    "pre_seq_len",  # P-Tuning's prefix
    "quantization_bit",
    "position_encoding_2d",  # ChatGLM 1
)
NAMES = dict(
    vocab_size="padded_vocab_size",
    hidden_size="hidden_size",
    num_hidden_layers="num_layers",
    num_attention_heads="num_attention_heads",
    num_key_value_heads="multi_query_group_num",
    head_dim="kv_channels",
    intermediate_size="ffn_hidden_size",
    max_position_embeddings="seq_length",
    rms_norm_eps="layernorm_epsilon",
    attention_bias="add_qkv_bias",
)
RENAMED = {  # beginnings of names
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.layers.": "model.layers.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.output_layer.": "lm_head.",
}
FUSED = {  # their layer -> those of ours that it holds, one below the other
    "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.dense": ("self_attn.o_proj",),
    "mlp.dense_h_to_4h": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.dense_4h_to_h": ("mlp.down_proj",),
}
DERIVED = "transformer.rotary_pos_emb.inv_freq"  # a buffer that follows from the settings


def config_from_chatglm(values: dict[str, Any]) -> ModelConfig:
    """The architecture in the content of a `config.json` with model_type chatglm. UserError names what we do not
    compute, or what is missing."""
    wrong = [f"{name}={values[name]!r}" for name in ON if not values.get(name, True)]
    wrong += [f"{name}={values[name]!r}" for name in OFF if values.get(name)]
    if not values.get("multi_query_attention"):  # query_key_value would be laid out head by head
        wrong.append(f"multi_query_attention={values.get('multi_query_attention')!r}")
    if wrong:
        raise UserError(f"config.json: of ChatGLM's settings not supported: {', '.join(wrong)}")
    if missing := [theirs for theirs in NAMES.values() if theirs not in values]:
        raise UserError(f"config.json: ChatGLM's {', '.join(missing)} missing")
    return ModelConfig(
        **{ours: values[theirs] for ours, theirs in NAMES.items()},
        rope_theta=10000.0 * values.get("rope_ratio", 1),
        rotary_fraction=0.5,
        rope_interleaved=True,
        tie_word_embeddings=bool(values.get("tie_word_embeddings")),
    )


def our_name(name: str) -> str | None:
    """A tensor's name with our beginning; None: the tensor is not needed."""
    if name == DERIVED:
        return None
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
