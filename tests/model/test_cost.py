"""What a shape costs, against built models and by hand."""

import pytest
import torch

from common.files import ROOT
from model.config import MIXTURE, PRESETS, ModelConfig
from model.cost import LOGITS_AT_ONCE, batch_bytes, cache_bytes, count_parameters, frozen_bytes, state_bytes, step_flops
from model.precision import lower_frozen
from model.quant import quantize_model
from model.transformer import CausalLM

# d 4, one head of 4, feed-forward 8, 10 words
TINY = dict(
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=8,
    vocab_size=10,
)


@pytest.mark.parametrize(
    "preset, total, active",
    [("small", 25_829_888, None), ("base", 104_030_976, None), ("moe", 145_029_760, 91_945_600)],
)
def test_presets_have_the_promised_sizes(preset, total, active):
    config = ModelConfig.preset(preset)
    assert count_parameters(config) == total
    assert count_parameters(config, active=True) == (active or total)


QWEN2_MOE = dict(num_experts=4, shared_expert_intermediate_size=24)


@pytest.mark.parametrize(
    "changes",
    (
        {},
        MIXTURE,
        dict(attention_bias=True, qk_norm=True, tie_word_embeddings=False),
        dict(post_norms=True),
        QWEN2_MOE,
    ),
)
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_built_model(preset, changes):
    config = ModelConfig.preset(preset, **changes)
    with torch.device("meta"):
        model = CausalLM(config)
    assert count_parameters(config) == model.num_parameters()
    assert count_parameters(config, active=True) == model.num_parameters(active=True)


def test_nano_is_about_three_million():
    assert 2.5e6 < count_parameters(ModelConfig.preset("nano")) < 4e6


def test_flops_by_hand():
    """q, k, v, o have 4 x 16 weights, the feed-forward three matrices of 32, the head 40. A position costs
    6 x (64 + 96 + 40) = 1200, and 6 x 4 x T for attention. Frozen weights have no gradient of their own."""
    shape = ModelConfig(**TINY)
    assert step_flops(shape, positions=32, length=16) == 32 * (1200 + 6 * 4 * 16)
    assert step_flops(shape, 32, 16, heads=8) == 32 * (960 + 6 * 4 * 16) + 8 * 240
    mixture = ModelConfig(**TINY, **QWEN2_MOE, num_experts_per_tok=1)  # width 8 + 24, and a router of 4 x 4
    assert step_flops(mixture, positions=1, length=16) == 6 * (64 + 3 * 4 * 32 + 16 + 40) + 6 * 4 * 16
    assert step_flops(shape, 32, 16, trained=0) == 32 * (800 + 6 * 4 * 16)


def test_a_window_saves_what_it_hides():
    """Rows of 16 with a window of 4: 4^2/2 + 12 x 4 = 56 pairs of query and key instead of 16^2/2 = 128. A pair costs
    12 x 4 operations. A second layer without a window has all pairs."""
    shape = ModelConfig(**TINY, sliding_window=4)
    assert step_flops(shape, 16, 16) == 16 * 1200 + 56 * 12 * 4
    assert step_flops(ModelConfig(**TINY, sliding_window=99), 16, 16) == 16 * 1200 + 128 * 12 * 4
    two = ModelConfig(
        **{**TINY, "num_hidden_layers": 2},
        sliding_window=4,
        layer_types=("full_attention", "sliding_attention"),
    )
    assert step_flops(two, 16, 16) == 16 * (1200 + 960) + (56 + 128) * 12 * 4


def test_bytes_by_hand():
    """A row of 100: 8 x 4 + 2 x 4 + 3 x 8 = 64 numbers a position, and 10 logits and their gradient. A cache: 2 x 4
    numbers a position. AdamW: weight, gradient and two moments of 10 trained parameters, and 5 frozen weights, are 45
    numbers."""
    shape = ModelConfig(**TINY)
    assert batch_bytes(shape, 3, 100, width=2) == 300 * (64 + 10 * 2) * 2
    assert batch_bytes(shape, 3, 100, width=2, frozen_head=True) == 300 * (64 + 10 * 3) * 2
    many = LOGITS_AT_ONCE // 4  # 10 logits each: 2.5 times as many as exist at once, so a third of them, in 3 copies
    assert batch_bytes(shape, 1, many, width=2) == many * 64 * 2 + 3 * -(-many * 10 // 3) * 2
    assert cache_bytes(shape, rows=3, length=100, width=2) == 3 * 100 * 8 * 2
    assert state_bytes(trained=10, frozen=20, moments=2) == 45 * 4
    # ZeRO with two processes: weights and gradients of 40 bytes each, 120 of moments and of the copy
    sizes = [state_bytes(10, 20, 2, zero_stage=stage, processes=2) for stage in (1, 2, 3)]
    assert sizes == [40 + 20 + 40 + 60, 40 + 20 + 20 + 60, 20 + 10 + 20 + 60]
    assert state_bytes(10, 20, 2, zero_stage=2, processes=2, offloaded=True) == 40 + 20 + 20


@pytest.mark.parametrize("bits", (None, 4, 8))
@pytest.mark.parametrize("kind", range(4))
def test_bytes_of_a_frozen_model_are_those_of_its_tensors(bits, kind):
    """Whatever has biases, norms, routers or experts, and matrices that are no multiple of a block."""
    shape = dict(vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    shape |= (
        dict(attention_bias=True, intermediate_size=43),
        dict(qk_norm=True, post_norms=True, head_dim=10),
        dict(num_experts=3, num_shared_experts=2, moe_intermediate_size=16, tie_word_embeddings=False),
        dict(num_experts=3, shared_expert_intermediate_size=20, moe_intermediate_size=16),
    )[kind]
    with torch.device("meta"):
        model = CausalLM(ModelConfig(**shape))
    model.requires_grad_(False)
    if bits:
        quantize_model(model, bits)
    lower_frozen(model, torch.bfloat16)
    found = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - model.rope_frequencies.nbytes
    assert frozen_bytes(model.config, width=2, bits=bits) == found


SIZES = {  # the published shapes: d, layers, heads, key/value heads, feed-forward, words, biases, tied
    "Qwen2 0.5B": (896, 24, 14, 2, 4864, 151936, True, True),
    "Qwen2 1.5B": (1536, 28, 12, 2, 8960, 151936, True, True),
    "ChatGLM3 6B": (4096, 28, 32, 2, 13696, 65024, True, False),
    "Llama 2 7B": (4096, 32, 32, 32, 11008, 32000, False, False),
    "Qwen2.5 7B": (3584, 28, 28, 4, 18944, 152064, True, False),
    "Qwen2.5 14B": (5120, 48, 40, 8, 13824, 152064, True, False),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_docs_lora_is_the_formulas(name):
    d, layers, heads, kv, width, words, biases, tied = SIZES[name]
    config = ModelConfig(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=width,
        vocab_size=words,
        attention_bias=biases,
        tie_word_embeddings=tied,
    )
    cells = (f"{frozen_bytes(config, 2, bits) / 2**30:.2f} GiB" for bits in (None, 8, 4))
    assert f"| {name} | {' | '.join(cells)} |" in (ROOT / "docs/lora.md").read_text(encoding="utf-8").splitlines()
