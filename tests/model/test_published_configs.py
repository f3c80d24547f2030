"""The config.json of published models, every setting as its makers wrote it. Only sizes are made small. transformers
reads the same file: the logits must be equal."""

import json

import pytest
import torch

from model.checkpoint import load_weights
from model.interop.hf import config_from_hf

SMALL = dict(  # where a file has the setting
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    head_dim=8,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=32,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
WINDOW = 16  # so that 200 tokens are longer than it

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=11008,
    max_position_embeddings=4096,
    model_type="llama",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    tie_word_embeddings=False,
    torch_dtype="float16",
    transformers_version="4.31.0.dev0",
    use_cache=True,
    vocab_size=32000,
)
LLAMA3 = LLAMA | dict(
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    intermediate_size=14336,
    max_position_embeddings=131072,
    mlp_bias=False,
    num_key_value_heads=8,
    rope_scaling=dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    rope_theta=500000.0,
    torch_dtype="bfloat16",
    vocab_size=128256,
)
MISTRAL = dict(
    architectures=["MistralForCausalLM"],
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=14336,
    max_position_embeddings=32768,
    model_type="mistral",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-05,
    rope_theta=10000.0,
    sliding_window=4096,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.34.0.dev0",
    use_cache=True,
    vocab_size=32000,
)
QWEN2 = dict(
    architectures=["Qwen2ForCausalLM"],
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151643,
    hidden_act="silu",
    hidden_size=896,
    initializer_range=0.02,
    intermediate_size=4864,
    max_position_embeddings=131072,
    max_window_layers=24,
    model_type="qwen2",
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    sliding_window=131072,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    transformers_version="4.40.1",
    use_cache=True,
    use_sliding_window=False,
    vocab_size=151936,
)
QWEN2_MOE = QWEN2 | dict(
    architectures=["Qwen2MoeForCausalLM"],
    decoder_sparse_step=1,
    hidden_size=3584,
    intermediate_size=18944,
    max_window_layers=28,
    model_type="qwen2_moe",
    moe_intermediate_size=2560,
    norm_topk_prob=False,
    num_experts=64,
    num_experts_per_tok=8,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=20480,
    sliding_window=65536,
    tie_word_embeddings=False,
)
QWEN3 = QWEN2 | dict(
    architectures=["Qwen3ForCausalLM"],
    attention_bias=False,
    eos_token_id=151645,
    head_dim=128,
    hidden_size=2560,
    intermediate_size=9728,
    max_position_embeddings=40960,
    max_window_layers=36,
    model_type="qwen3",
    num_attention_heads=32,
    num_hidden_layers=36,
    num_key_value_heads=8,
    rope_scaling=None,
    sliding_window=None,
    transformers_version="4.51.0",
)
QWEN3_MOE = QWEN3 | dict(
    architectures=["Qwen3MoeForCausalLM"],
    decoder_sparse_step=1,
    mlp_only_layers=[],
    model_type="qwen3_moe",
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_experts=128,
    num_experts_per_tok=8,
    num_key_value_heads=4,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
    tie_word_embeddings=False,
)
GLM = dict(
    architectures=["GlmForCausalLM"],
    attention_bias=True,
    attention_dropout=0.0,
    eos_token_id=[151329, 151336, 151338],
    head_dim=128,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=13696,
    max_position_embeddings=131072,
    model_type="glm",
    num_attention_heads=32,
    num_hidden_layers=40,
    num_key_value_heads=2,
    pad_token_id=151329,
    partial_rotary_factor=0.5,
    rms_norm_eps=1.5625e-07,
    rope_theta=5000000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.46.0.dev0",
    use_cache=True,
    vocab_size=151552,
)
DUAL_CHUNK = dict(chunk_size=262144, local_size=8192, original_max_position_embeddings=262144)
PUBLISHED = {
    "Llama-2-7b-hf": LLAMA,
    "Meta-Llama-3-8B": {k: v for k, v in LLAMA3.items() if k != "rope_scaling"} | dict(max_position_embeddings=8192),
    "Llama-3.1-8B-Instruct": LLAMA3,
    "Llama-3.2-1B": LLAMA3
    | dict(head_dim=64, tie_word_embeddings=True, rope_scaling=LLAMA3["rope_scaling"] | dict(factor=32.0)),
    "Mistral-7B-v0.1": MISTRAL,
    "Mistral-7B-Instruct-v0.3": MISTRAL | dict(rope_theta=1e6, sliding_window=None, vocab_size=32768),
    "Mistral-Nemo-Base-2407": MISTRAL | dict(head_dim=128, hidden_size=5120, rope_theta=1e6, sliding_window=None),
    "Ministral-8B-Instruct-2410": MISTRAL | dict(head_dim=128, rope_theta=1e8, sliding_window=32768),
    "Qwen2-0.5B": QWEN2,
    "Qwen2-7B-Instruct": QWEN2 | dict(max_position_embeddings=32768, tie_word_embeddings=False),
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN2
    | dict(rope_theta=10000, sliding_window=4096, tie_word_embeddings=False, use_mrope=False),
    "Qwen2.5-7B-Instruct with the card's YaRN": QWEN2
    | dict(
        max_position_embeddings=32768,
        rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn"),
    ),
    "Qwen2.5-7B-Instruct-1M": QWEN2
    | dict(dual_chunk_attention_config=DUAL_CHUNK, max_position_embeddings=1010000, rope_theta=10000000.0),
    "Qwen1.5-MoE-A2.7B": QWEN2_MOE | dict(max_window_layers=21, num_key_value_heads=16, sliding_window=32768),
    "Qwen2-57B-A14B": QWEN2_MOE,
    "Qwen3-4B": QWEN3,
    "Qwen3-4B-Instruct-2507": QWEN3 | dict(max_position_embeddings=262144, rope_theta=5000000),
    "Qwen3-8B with the card's YaRN": QWEN3
    | dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
        tie_word_embeddings=False,
    ),
    "Qwen3-30B-A3B": QWEN3_MOE,
    "Qwen3-30B-A3B-Instruct-2507": QWEN3_MOE | dict(max_position_embeddings=262144, rope_theta=10000000),
    "glm-4-9b-chat-hf": GLM,
    "GLM-4-9B-0414": GLM
    | dict(
        architectures=["Glm4ForCausalLM"],
        attention_bias=False,
        max_position_embeddings=32768,
        model_type="glm4",
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
    ),
}
CHATGLM3 = dict(
    model_type="chatglm",
    architectures=["ChatGLMModel"],
    auto_map=dict(AutoConfig="configuration_chatglm.ChatGLMConfig"),
    add_bias_linear=False,
    add_qkv_bias=True,
    apply_query_key_layer_scaling=True,
    apply_residual_connection_post_layernorm=False,
    attention_dropout=0.0,
    attention_softmax_in_fp32=True,
    bias_dropout_fusion=True,
    ffn_hidden_size=13696,
    fp32_residual_connection=False,
    hidden_dropout=0.0,
    hidden_size=4096,
    kv_channels=128,
    layernorm_epsilon=1e-05,
    multi_query_attention=True,
    multi_query_group_num=2,
    num_attention_heads=32,
    num_layers=28,
    original_rope=True,
    padded_vocab_size=65024,
    post_layer_norm=True,
    rmsnorm=True,
    seq_length=8192,
    use_cache=True,
    torch_dtype="float16",
    transformers_version="4.27.1",
    tie_word_embeddings=False,
    eos_token_id=2,
    pad_token_id=0,
)


def shrunk(values: dict) -> dict:
    small = values | {key: value for key, value in SMALL.items() if key in values}
    share = values["num_attention_heads"] // values["num_key_value_heads"]
    small["num_key_value_heads"] = {1: 6, 4: 3}.get(share, 2)
    if values.get("sliding_window"):
        small["sliding_window"] = WINDOW
    return small


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_transformers_logits(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = json.dumps(shrunk(PUBLISHED[name]))
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")  # theirs has the spelling of today
    tokens = torch.randint(1, SMALL["vocab_size"], (2, 200))
    with torch.no_grad():
        logits = load_weights(tmp_path).build()(tokens).logits
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_beyond_a_chunk_qwens_dual_chunk_attention_would_be_another():
    """transformers ignores it, at any length."""
    config = config_from_hf(PUBLISHED["Qwen2.5-7B-Instruct-1M"])
    assert config.max_position_embeddings == 262144 - 8192


@pytest.mark.parametrize("name, changes", [("6b", {}), ("6b-32k", dict(rope_ratio=50, seq_length=32768))])
def test_chatglm3s_published_config_is_read(name, changes):
    """Its logits: test_chatglm.py."""
    config = config_from_hf(CHATGLM3 | changes)
    shape = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.intermediate_size)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rotary_dim)
    assert shape == (65024, 4096, 28, 13696) and heads == (32, 2, 128, 64)
    assert config.attention_bias and not config.tie_word_embeddings and config.rope_interleaved
    assert config.rope_theta == 10000 * changes.get("rope_ratio", 1)
