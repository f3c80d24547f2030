"""GGUF files: what is in them, read by the package `gguf`, and what llama.cpp computes of them."""

import functools
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch

from common.console import UserError
from model.config import ModelConfig
from model.interop.gguf import architecture_of, read_gguf, to_halves, to_neighbours, write_gguf
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.models import TOKENIZER, random_model
from tests.helpers.tokenizers import BEGINS, llama_like
from tokenizer.chat import TEMPLATE
from tokenizer.text import SHIPPED, Tokenizer

gguf = pytest.importorskip("gguf")

SHAPE = dict(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=256,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
MINIMIND2 = dict(rope_type="minimind2", factor=4, beta_fast=4, beta_slow=1, original_max_position_embeddings=64)
CASES = {
    "small": ("llama", {}),
    "wide heads, untied": ("llama", dict(head_dim=32, tie_word_embeddings=False)),
    "qwen2": ("qwen2", dict(attention_bias=True)),
    "nano": ("qwen3", dict(qk_norm=True, head_dim=32)),
    "yarn": ("llama", dict(rope_scaling=YARN)),
    "minimind 3's yarn": ("qwen3", dict(qk_norm=True, rope_scaling=dict(YARN, attention_factor=1.0))),
    "linear": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=2.5))),
    "llama 3": ("llama", dict(rope_scaling=LLAMA3)),
    "minimind 2's yarn": ("llama", dict(rope_scaling=MINIMIND2)),
    "glm 4": (
        "glm4",
        dict(rope_interleaved=True, post_norms=True, rotary_fraction=0.5, attention_bias=True, head_dim=16),
    ),
    "mixtral": ("llama", dict(num_experts=4)),
    "minimind 3 moe": ("qwen3moe", dict(num_experts=12, qk_norm=True, num_experts_per_tok=1)),
    "qwen2 moe": (
        "qwen2moe",
        dict(num_experts=4, attention_bias=True, norm_topk_prob=False, shared_expert_intermediate_size=64),
    ),
    "moe": ("bailingmoe", dict(num_experts=4, num_shared_experts=2)),
    "moe, weights as they are": ("bailingmoe", dict(num_experts=4, num_shared_experts=1, norm_topk_prob=False)),
    "nano moe": ("bailingmoe2", dict(num_experts=4, num_shared_experts=1, qk_norm=True)),
}


@functools.cache
def few_tokens() -> Tokenizer:
    """The first 300 tokens of the shipped one, because thousands take seconds to read."""
    folder = Path(tempfile.mkdtemp())
    spec = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab = {token: i for token, i in spec["vocab"].items() if i < 300}
    merges = [pair for pair in spec["merges"] if "".join(pair) in vocab]
    return changed_tokenizer(folder, model=dict(spec, vocab=vocab, merges=merges))


def write(path, dtype="float32", tokenizer=None, **changes):
    """-> the model that was written, its tensors, and the lines said"""
    tokenizer = tokenizer or few_tokens()
    shape = SHAPE | dict(vocab_size=tokenizer.vocab_size) | changes
    model = random_model(ModelConfig(**shape), 0.08)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return model, state, write_gguf(path, model.config, state, tokenizer, dtype=dtype)


def fields(path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# ---- tensors


def test_rows_of_a_head_in_the_order_of_neighbours():
    """Two heads of 4 rows: pairs (0, 2) and (1, 3) become neighbours."""
    rows = torch.arange(8.0)[:, None]
    moved = to_neighbours(rows, heads=2)
    assert moved[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(to_halves(moved, heads=2), rows)


@pytest.mark.parametrize("name", CASES)
def test_tensors_come_back_bit_for_bit(name, tmp_path):
    architecture, changes = CASES[name]
    model, state, _ = write(tmp_path / "a.gguf", **changes)
    assert fields(tmp_path / "a.gguf")["general.architecture"] == architecture
    found = read_gguf(tmp_path / "a.gguf", model.config, list(state))
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_q8_0_is_the_packages_and_small_tensors_stay_whole(tmp_path):
    """A block of 32 numbers has one scale, its largest number / 127: none moves by more than half of it (and the
    scale itself is fp16)."""
    model, state, notes = write(tmp_path / "a.gguf", "q8_0", intermediate_size=80)
    kinds = {item.name: item.tensor_type.name for item in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "F16", "80 is no multiple of 32"
    assert notes == ["2 tensors whose rows are no multiple of 32 are float16: blk.0.ffn_down.weight, ..."]
    found = read_gguf(tmp_path / "a.gguf", model.config, list(state))
    name = "model.layers.1.mlp.up_proj.weight"
    blocks, original = found[name].view(-1, 32), state[name].view(-1, 32)
    step = original.abs().amax(1, keepdim=True) / 127
    assert ((blocks - original).abs() <= 0.57 * step).all() and (blocks != original).any()


def test_a_file_of_another_model_is_named(tmp_path):
    _, state, _ = write(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="a.gguf: blk.0.attn_k.bias is missing, or does not belong"):
        config = ModelConfig(**SHAPE, attention_bias=True)
        read_gguf(tmp_path / "a.gguf", config, list(random_model(config, 0.1).state_dict())[:-1])


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(rotary_fraction=0.5), "llama would need rotary_fraction 1.0 .it is 0.5"),
        (dict(qk_norm=True, attention_bias=True), "would need"),
        (dict(qk_norm=True, rope_scaling=LLAMA3), "would need qk_norm False"),
        (dict(num_experts=4, norm_topk_prob=False), "would need"),
        (dict(sliding_window=16, rope_local_theta=20.0), "would need rope_local_theta None"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=f"llama.cpp has no architecture for this model; .*{named}"):
        architecture_of(ModelConfig(**SHAPE, **changes))


def test_a_window_limits_the_context(tmp_path):
    """llama.cpp has no window in these architectures: up to its length, nothing is hidden by one."""
    *_, notes = write(tmp_path / "a.gguf", sliding_window=100)
    assert fields(tmp_path / "a.gguf")["llama.context_length"] == 100
    assert notes[0].startswith("context length 100: beyond its sliding window")


# ---- the tokenizer


def test_the_tokenizer_in_the_file(tmp_path):
    """<think> is no "special" token of tokenizer.json; as USER_DEFINED, llama.cpp would find it in text."""
    write(tmp_path / "a.gguf", tokenizer=TOKENIZER, vocab_size=6410)
    found = fields(tmp_path / "a.gguf")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 6410 and tokens[:4] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
    ]
    assert kinds[:16] == [3] * 16 and set(kinds[16:6400]) == {1} and set(kinds[6400:]) == {5}
    assert tokens[6400] == "[PAD6400]"
    assert found["tokenizer.ggml.eos_token_id"] == 2 and found["tokenizer.ggml.padding_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == TEMPLATE


@pytest.mark.parametrize("config, adds", [({}, True), ({"add_bos_token": False}, False), ({"bos_token": None}, False)])
def test_llama_cpp_puts_bos_before_a_text_where_we_do(config, adds, tmp_path):
    llama = llama_like(tmp_path / "llama", "the", **config)
    write(tmp_path / "a.gguf", tokenizer=llama, vocab_size=llama.vocab_size)
    assert fields(tmp_path / "a.gguf")["tokenizer.ggml.add_bos_token"] is adds is (llama.start_of_text == [BEGINS])


def changed_tokenizer(folder, **changes) -> Tokenizer:
    """The shipped one with other steps before merging."""
    spec = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    spec |= changes
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return Tokenizer.load(folder)


BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
DIGITS = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
DIGITS["pretokenizers"][0]["pattern"]["Regex"] = DIGITS["pretokenizers"][0]["pattern"]["Regex"].replace(
    r"|\p{N}|", r"|\p{N}{1,3}|"
)


@pytest.mark.parametrize("steps, name", [(BYTES, "gpt-2"), (DIGITS, "dbrx")])
def test_how_text_is_cut_has_a_name(steps, name, tmp_path):
    write(tmp_path / "a.gguf", tokenizer=changed_tokenizer(tmp_path, pre_tokenizer=steps))
    assert fields(tmp_path / "a.gguf")["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    "changes",
    [
        dict(pre_tokenizer=dict(BYTES, add_prefix_space=True)),
        dict(pre_tokenizer=dict(type="Whitespace")),
        dict(pre_tokenizer=dict(BYTES, use_regex=False)),
        dict(normalizer=dict(type="Lowercase")),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(changes, tmp_path):
    """A file without a name it knows would load, and give other ids."""
    with pytest.raises(UserError, match="llama.cpp would cut text in another way than this tokenizer"):
        write(tmp_path / "a.gguf", tokenizer=changed_tokenizer(tmp_path, **changes))


# ---- llama.cpp

TEXTS = [
    "Hello, world! It's 12,345.67 dollars; we'll DON'T",
    "你好，世界！今天天气怎么样？ 我有123个苹果。",
    "  leading, trailing  \n\n\n\ttabs\r\nand\r lines   ",
    "emoji 👩‍👩‍👧‍👦🇨🇳 é e\u0301 \u00a0 \u3000 ﬁ",
    "<|im_start|>user\nx<|im_end|><think>y</think> <|endoftext|>",
    'def f(x):\n    return {"a": [1, 2], **x}  # comment\n',
    "Ελληνικά русский العربية हिन्दी 한국어 ไทย",
    "aaaaaaaaaaaaaaaaaaaaaaaa          b",
]


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name, tmp_path):
    """The next token's log-probabilities after 60 tokens (rope scaling shows there), and the greedy continuation."""
    model, _, _ = write(tmp_path / "a.gguf", **CASES[name][1])
    ids = torch.randint(16, 300, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    llama = LlamaCpp(tmp_path / "a.gguf")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        greedy = list(ids)
        for _ in range(8):
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    found = llama.next_token(ids)
    assert max(abs(found[i] - expected[i].item()) for i in found) < 1e-4
    assert llama.greedy(ids, 8) == greedy[60:]


@pytest.mark.parametrize("steps", [None, BYTES, DIGITS], ids=["ours", "gpt-2", "three digits"])
def test_llama_cpp_tokenises_the_same(steps, tmp_path):
    """Also what looks like a control token: text never becomes one."""
    tokenizer = changed_tokenizer(tmp_path, pre_tokenizer=steps) if steps else TOKENIZER
    write(tmp_path / "a.gguf", tokenizer=tokenizer)
    llama = LlamaCpp(tmp_path / "a.gguf")
    for text in TEXTS:
        assert llama.tokenize(text) == tokenizer.encode(text), text
    assert llama.tokenize("<|im_start|>", special=True) == [1]


@pytest.mark.soak
def test_llama_cpp_tokenises_real_text_the_same(shared, tmp_path):
    """4,000 rows of six files, in both languages."""
    write(tmp_path / "a.gguf", tokenizer=TOKENIZER)
    llama, count = LlamaCpp(tmp_path / "a.gguf"), 0
    for path in sorted((shared / "data").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:700]:
            text, count = json.dumps(json.loads(line), ensure_ascii=False)[:2000], count + 1
            assert llama.tokenize(text) == TOKENIZER.encode(text), text
    assert count > 3000


def test_llama_cpp_with_fewer_bits_is_near(tmp_path):
    model, _, _ = write(tmp_path / "a.gguf", "q8_0")
    ids = list(range(100, 160))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = LlamaCpp(tmp_path / "a.gguf").next_token(ids)
    assert math.isclose(found[int(expected.argmax())], expected.max().item(), abs_tol=0.1)
    assert max(abs(found[i] - expected[i].item()) for i in found) > 1e-5, "it is rounded"
