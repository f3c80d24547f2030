"""Checkpoints of other families are trained with the tokenizer and the template that lie beside them."""

import json

import pytest
import torch

from common.files import ROOT
from model.checkpoint import load_weights
from model.config import ModelConfig
from model.interop.hf import config_to_hf, hf_tensors
from model.transformer import CausalLM
from tests.helpers.chatglm import write_chatglm3
from tests.helpers.rows import write_sft
from tests.helpers.runs import run_stage
from tokenizer.text import Tokenizer

SHAPE = dict(
    vocab_size=6400, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8
)
GLM = dict(attention_bias=True, rotary_fraction=0.5, rope_interleaved=True, tie_word_embeddings=False)
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=8),
    "qwen2": dict(attention_bias=True),
    "glm": GLM,
    "glm4": GLM | dict(post_norms=True),
    "qwen2_moe": dict(num_experts=4, attention_bias=True, moe_intermediate_size=8, shared_expert_intermediate_size=8),
}
TEMPLATE = """[gMASK]<sop>
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""
NAMES = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"]


def write_tokenizer(folder):
    """The shipped vocabulary with GLM's control tokens after it."""
    spec = json.loads((ROOT / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"] = {token: i - 16 for token, i in spec["model"]["vocab"].items() if i >= 16}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec["added_tokens"] = [dict(id=6384 + n, content=name, **flags) for n, name in enumerate(NAMES)]
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = dict(eos_token="<|endoftext|>", chat_template=TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_and_written_in_its_own_layout(family, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    folder.mkdir()
    torch.manual_seed(0)
    config = ModelConfig(**SHAPE, **FAMILIES[family])
    assert config_to_hf(config)["model_type"] == family
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    state = {name: tensor.clone() for name, tensor in CausalLM(config).state_dict().items()}
    save_file(hf_tensors(config, state), folder / "model.safetensors")
    write_tokenizer(folder)
    data = write_sft(tmp_path / "sft.jsonl")
    out = tmp_path / "out"
    flags = [f"--data_path={data}", f"--from_weight={folder}", f"--output_dir={out}", "--max_steps=1"]
    run_stage("full_sft", *flags)

    (trained,) = out.glob("full_sft_*.pth")
    after = load_weights(trained)
    assert after.config == config and after.tokenizer["path"] == str(folder)
    assert any(not torch.equal(tensor, state[name]) for name, tensor in after.state.items())
    before, written = (set(load_file(where / "model.safetensors")) for where in (folder, out / "final_model"))
    assert written == (before - {"lm_head.weight"} if config.tie_word_embeddings else before)
    again = load_weights(out / "final_model")
    assert all(torch.equal(again.state[name], tensor) for name, tensor in after.state.items())
    assert (out / "final_model" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_chatglm3_is_trained_with_its_sentencepiece_tokenizer(tmp_path):
    """In its own layout: fused tensors under its own names, tokenizer.model, no template in the directory."""
    folder = write_chatglm3(tmp_path / "base")
    data, out = write_sft(tmp_path / "sft.jsonl", rows=8), tmp_path / "out"
    flags = [f"--data_path={data}", f"--from_weight={folder}", f"--output_dir={out}", "--max_steps=1"]
    run_stage("lora", *flags, "--lora_targets=query_key_value", "--max_seq_len=64")
    assert next(out.rglob("*.pth")).is_file()
    assert Tokenizer.load(folder).stop_ids == {2, 296, 298}  # </s>, <|user|>, <|observation|>
