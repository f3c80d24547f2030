"""Tiny random ChatGLM3 checkpoints, laid out as THUDM/chatglm3-6b is."""

import json

import pytest
import torch
from safetensors.torch import save_file

CONFIG = dict(
    model_type="chatglm",
    add_bias_linear=False,
    add_qkv_bias=True,
    apply_query_key_layer_scaling=True,
    apply_residual_connection_post_layernorm=False,
    ffn_hidden_size=40,
    hidden_size=48,
    kv_channels=8,
    layernorm_epsilon=1e-5,
    multi_query_attention=True,
    multi_query_group_num=2,
    num_attention_heads=4,
    num_layers=2,
    original_rope=True,
    padded_vocab_size=61,
    post_layer_norm=True,
    rmsnorm=True,
    seq_length=64,
    tie_word_embeddings=False,
)


def random_state(values: dict) -> dict[str, torch.Tensor]:
    d, H, D = values["hidden_size"], values["num_attention_heads"], values["kv_channels"]
    qkv, width = (H + 2 * values["multi_query_group_num"]) * D, values["ffn_hidden_size"]
    shapes = {
        "embedding.word_embeddings.weight": (values["padded_vocab_size"], d),
        "encoder.final_layernorm.weight": (d,),
        "output_layer.weight": (values["padded_vocab_size"], d),
        "rotary_pos_emb.inv_freq": (D // 4,),
    }
    for i in range(values["num_layers"]):
        layer = {
            "input_layernorm.weight": (d,),
            "self_attention.query_key_value.weight": (qkv, d),
            "self_attention.query_key_value.bias": (qkv,),
            "self_attention.dense.weight": (d, H * D),
            "post_attention_layernorm.weight": (d,),
            "mlp.dense_h_to_4h.weight": (2 * width, d),
            "mlp.dense_4h_to_h.weight": (d, width),
        }
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    torch.manual_seed(0)
    return {f"transformer.{name}": torch.randn(shape) * 0.3 + 0.1 for name, shape in shapes.items()}


def write_chatglm(folder, **changes) -> dict[str, torch.Tensor]:
    """A directory with config.json and weights -> its tensors. `changes`: values of config.json other than CONFIG's."""
    values = CONFIG | changes
    state = random_state(values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(state, folder / "model.safetensors")
    return state


def write_chatglm3(folder):
    """The same with a tokenizer.model, and no template in the directory -> the directory."""
    package = pytest.importorskip("sentencepiece")
    write_chatglm(folder, padded_vocab_size=300)
    text = folder.with_name("text")
    text.write_text("hello world, how are you today\n" * 50, encoding="utf-8")
    options = dict(model_type="bpe", byte_fallback=True, vocab_size=290, minloglevel=2)
    package.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), hard_vocab_limit=True, **options
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}', encoding="utf-8")
    return folder
