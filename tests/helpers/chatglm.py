"""A ChatGLM3 of some thousand parameters, in its own layout."""

import json

import pytest
import torch


def write_chatglm3(folder):
    """Fused tensors under its own names, tokenizer.model, no template in the directory -> the directory."""
    package = pytest.importorskip("sentencepiece")
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    text = folder.with_name("text")
    text.write_text("hello world, how are you today\n" * 50, encoding="utf-8")
    options = dict(model_type="bpe", byte_fallback=True, vocab_size=290, minloglevel=2)
    package.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), hard_vocab_limit=True, **options
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}', encoding="utf-8")
    values = dict(model_type="chatglm", padded_vocab_size=300, hidden_size=16, num_layers=1, num_attention_heads=2)
    values |= dict(multi_query_attention=True, multi_query_group_num=1, kv_channels=8, ffn_hidden_size=24)
    values |= dict(seq_length=64, layernorm_epsilon=1e-5, add_qkv_bias=True, rmsnorm=True, post_layer_norm=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    layer = "encoder.layers.0"
    shapes = {
        "embedding.word_embeddings.weight": (300, 16),
        f"{layer}.input_layernorm.weight": (16,),
        f"{layer}.self_attention.query_key_value.weight": (32, 16),
        f"{layer}.self_attention.query_key_value.bias": (32,),
        f"{layer}.self_attention.dense.weight": (16, 16),
        f"{layer}.post_attention_layernorm.weight": (16,),
        f"{layer}.mlp.dense_h_to_4h.weight": (48, 16),
        f"{layer}.mlp.dense_4h_to_h.weight": (16, 24),
        "encoder.final_layernorm.weight": (16,),
        "output_layer.weight": (300, 16),
    }
    state = {f"transformer.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    save_file(state, folder / "model.safetensors")
    return folder
