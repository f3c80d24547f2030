"""scripts/convert.py: each format is read by its own program and gives the same logits; a failure leaves nothing."""

import errno
import json
import os
import signal

import pytest
import torch

from common.files import ROOT
from model.adapter import load_adapter, save_adapter
from model.checkpoint import load_weights, open_weights, save_weights
from model.lora import LoRASettings, adapted, add_lora
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.runs import run_script

TOKENS = torch.arange(60).view(2, 30) * 97
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "你好 hello <think>"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "?"},
]


def convert(*words) -> str:
    """-> what was said. It must succeed."""
    status, out, err = run_script("scripts/convert.py", *words)
    assert status == 0, err
    return out + err


def refused(*words) -> str:
    """-> the error, one line"""
    status, _, err = run_script("scripts/convert.py", *words)
    assert status == 2 and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A weights file of ours, and its model."""
    folder, model = tmp_path_factory.mktemp("source"), small_model()
    tokenizer = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    path = save_weights(folder / "mine_32.pth", model, tokenizer=tokenizer, lineage=[dict(stage="full_sft")])
    return path, model


@pytest.fixture(scope="module")
def adapter(source, tmp_path_factory):
    """An adapter of q and o, which changes the answers, and the model with it."""
    path, _ = source
    checkpoint, model = load_weights(path), small_model()
    settings = LoRASettings(rank=4, alpha=16.0, targets=("q_proj", "o_proj"))
    add_lora(model, settings, "default", [name for name in _squares(model)])
    torch.manual_seed(1)
    for layer in adapted(model).values():
        torch.nn.init.normal_(layer.adapter("default").B, std=0.2)
    base = dict(path=str(path), hash=checkpoint.hash)
    target = tmp_path_factory.mktemp("lora") / "mine_lora_32.pth"
    return save_adapter(target, model, settings, base=base, tokenizer=checkpoint.tokenizer, lineage=[]), model


def _squares(model) -> list[str]:
    return [f"model.layers.{i}.self_attn.{name}_proj" for i in range(len(model.model.layers)) for name in "qo"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def entries(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# ---- Hugging Face's layout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_directory(source, tmp_path, dtype):
    """As it is, without code of ours: logits, the chat's ids, and generation ends at the end token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, model = source
    said = convert(path, tmp_path / "hf", "--to", "hf", "--dtype", dtype, "--shard_size", "0.0002")
    assert f"written: {tmp_path / 'hf'}" in said and "verified: logits differ by at most" in said
    assert "model.safetensors.index.json" in entries(tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert str(theirs.dtype) == f"torch.{dtype}" and type(theirs).__name__ == "LlamaForCausalLM"
    rounded = load_weights(tmp_path / "hf").build()
    torch.testing.assert_close(logits(theirs.float()), logits(rounded), atol=1e-5, rtol=1e-5)
    exact = dtype == "float32"
    assert torch.equal(logits(rounded), logits(model)) == exact

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    from tokenizer.chat import encode_chat

    chat = [message | dict(content=message["content"].replace("<think>", "")) for message in CHAT]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt == encode_chat(TOKENIZER, chat, add_generation_prompt=True).ids
    assert theirs.generation_config.eos_token_id == sorted(TOKENIZER.stop_ids)
    assert theirs.generation_config.pad_token_id == TOKENIZER.control["<|endoftext|>"]

    with torch.no_grad():  # a head that says <|im_end|> whatever was read
        theirs.model.norm.weight.zero_()
        theirs.lm_head.weight.zero_()
        theirs.model.norm.register_forward_hook(lambda *_: torch.ones(1, len(prompt), 32))
        theirs.lm_head.weight[TOKENIZER.im_end] = 1.0
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert out[0, len(prompt) :].tolist() == [TOKENIZER.im_end]


def test_an_adapter_is_merged_on_request(source, adapter, tmp_path):
    path, with_adapter = adapter
    said = convert(source[0], tmp_path / "hf", "--to", "hf", "--lora_path", path)
    assert f"merged: {path} into {source[0]}" in said
    found = logits(load_weights(tmp_path / "hf").build())
    torch.testing.assert_close(found, logits(with_adapter), atol=1e-5, rtol=1e-5)
    assert (found - logits(source[1])).abs().max() > 0.01

    half, stray = tmp_path / "half_32.pth", tmp_path / "stray_32.pth"
    convert(source[0], half, "--to", "pth", "--dtype", "bfloat16")
    settings = load_adapter(path).settings
    save_adapter(stray, with_adapter, settings, base=dict(path=None, hash=None), tokenizer={}, lineage=[])
    convert(half, tmp_path / "half", "--to", "hf", "--lora_path", stray)
    assert {tensor.dtype for tensor in load_weights(tmp_path / "half").state.values()} == {torch.bfloat16}
    convert(half, tmp_path / "full", "--to", "hf", "--lora_path", stray, "--dtype", "float32")
    q_proj = load_weights(tmp_path / "full").state["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(q_proj, q_proj.bfloat16().float()), "merged before it is rounded"

    other = save_weights(tmp_path / "other_32.pth", small_model(std=0.06), tokenizer={}, lineage=[])
    line = refused(other, tmp_path / "x", "--to", "hf", "--lora_path", path, "--tokenizer_path", TOKENIZER.path)
    assert f"{path}: was trained on" in line and not (tmp_path / "x").exists()


# ---- one file


@pytest.mark.parametrize("to, name", [("safetensors", "a.safetensors"), ("pth", "a.pth")])
def test_our_formats_keep_what_the_weights_say_of_themselves(source, tmp_path, to, name):
    path, model = source
    convert(path, tmp_path / name, "--to", to)
    found, tokenizer = open_weights(str(tmp_path / name))
    assert found.lineage == [dict(stage="full_sft")] and tokenizer.hash == TOKENIZER.hash
    assert found.hash == load_weights(path).hash
    convert(tmp_path / name, tmp_path / "half.pth", "--to", "pth", "--dtype", "f16")
    half = load_weights(tmp_path / "half.pth")
    assert {tensor.dtype for tensor in half.state.values()} == {torch.float16} and half.lineage == found.lineage


@pytest.mark.parametrize("name", [f"minimind{g}_{kind}" for g in (2, 3) for kind in ("dense", "moe", "yarn")])
def test_minimind_and_back(name, shared, tmp_path):
    """Their file -> ours -> theirs: the same tensors under the same names, and a config that says the same."""
    theirs, words = shared / "fixtures" / f"{name}.pth", ("--tokenizer_path", tmp_path / "tokenizer")
    _tokenizer(tmp_path / "tokenizer", 331)
    convert(theirs, tmp_path / "ours.pth", "--to", "pth", *words)
    said = convert(tmp_path / "ours.pth", tmp_path / "back.pth", "--to", "minimind", "--dtype", "float32", *words)
    assert f"copy {tmp_path / 'tokenizer'}/ into MiniMind's model/" in said  # the file does not know its tokenizer
    before, after = (torch.load(path, weights_only=True) for path in (theirs, tmp_path / "back.pth"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    stated = json.loads(theirs.with_suffix(".json").read_text(encoding="utf-8"))
    written = json.loads((tmp_path / "back.json").read_text(encoding="utf-8"))
    unused = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_routed_experts", "n_shared_experts")
    for key in stated.keys() - (() if stated["use_moe"] else set(unused)):
        assert written[key] == stated[key], key


def _tokenizer(folder, size: int) -> None:
    """The first tokens of the shipped one."""
    folder.mkdir()
    spec = json.loads((ROOT / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if i < size}
    merges = [pair for pair in spec["model"]["merges"] if "".join(pair) in vocab]
    spec["model"] |= dict(vocab=vocab, merges=merges)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")


def test_what_minimind_does_not_compute_is_named(tmp_path):
    path = save_weights(tmp_path / "a_32.pth", small_model(attention_bias=True), tokenizer={}, lineage=[])
    line = refused(path, tmp_path / "b.pth", "--to", "minimind", "--tokenizer_path", TOKENIZER.path)
    assert "MiniMind's code does not compute this model; it would need attention_bias False (it is True)" in line
    assert not (tmp_path / "b.pth").exists() and not (tmp_path / "b.json").exists()


def test_gguf_and_its_modelfile(source, tmp_path):
    """llama.cpp continues a chat with the ids that we do."""
    from tests.helpers.llama_cpp import LlamaCpp
    from tokenizer.chat import encode_chat

    path, model = source
    said = convert(path, tmp_path / "a.gguf", "--to", "gguf", "--dtype", "f32")
    assert "verified: logits differ by at most" in said
    lines = (tmp_path / "a.Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./a.gguf" and 'PARAMETER stop "<|im_end|>"' in lines
    ids = encode_chat(TOKENIZER, CHAT, add_generation_prompt=True).ids
    expected = list(ids)
    with torch.no_grad():
        for _ in range(12):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    llama = LlamaCpp(tmp_path / "a.gguf")
    assert llama.greedy(ids, 12) == expected[len(ids) :]


@pytest.mark.parametrize("name", [f"minimind{g}_{kind}" for g in (2, 3) for kind in ("dense", "moe", "yarn")])
def test_llama_cpp_gives_minimind_logits(name, shared, tmp_path):
    """Their file, their logits, and in between llama.cpp instead of their code."""
    from safetensors.torch import load_file

    from tests.helpers.llama_cpp import LlamaCpp

    theirs = shared / "fixtures" / f"{name}.pth"
    _tokenizer(tmp_path / "tokenizer", 331)
    words = ("--tokenizer_path", tmp_path / "tokenizer", "--dtype", "f32", "--no_verify")
    convert(theirs, tmp_path / "a.gguf", "--to", "gguf", *words)
    expected = load_file(theirs.with_name(f"{name}.logits.safetensors"))
    ids, logits = expected["input_ids"][0], expected["logits"][0]
    position, row = (30, 30) if len(logits) == len(ids) else (200, 4)  # the long file keeps every 50th position
    log_p = logits[row].float().log_softmax(-1)
    found = LlamaCpp(tmp_path / "a.gguf").next_token(ids[: position + 1].tolist())
    assert max(abs(found[i] - log_p[i].item()) for i in found) < 1e-3


# ---- adapters


def test_adapters_go_to_peft_to_minimind_and_back(source, adapter, tmp_path):
    path, with_adapter = adapter
    expected = logits(with_adapter)
    convert(path, tmp_path / "peft", "--to", "peft")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(entries(tmp_path / "peft"))
    convert(path, tmp_path / "theirs.pth", "--to", "minimind")
    for place in (tmp_path / "peft", tmp_path / "theirs.pth"):
        found = load_adapter(place).apply(load_weights(source[0]).build())
        torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-5)
    assert load_adapter(tmp_path / "theirs.pth").settings.scale == 1, "MiniMind's code knows no scale"

    line = refused(tmp_path / "theirs.pth", tmp_path / "b.pth", "--to", "pth")
    assert "does not say which weights it belongs to; name them with --weight" in line
    convert(tmp_path / "theirs.pth", tmp_path / "b.pth", "--to", "pth", "--weight", source[0])
    assert load_adapter(tmp_path / "b.pth").base["hash"] == load_weights(source[0]).hash


def test_an_adapter_by_its_name(adapter, tmp_path):
    """As weights are named. It was said to be whole weights, as no file of that name is here."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "lora_mine_32.pth").write_bytes(adapter[0].read_bytes())
    convert("lora_mine", tmp_path / "peft", "--to", "peft", "--save_dir", tmp_path)
    assert "adapter_model.safetensors" in entries(tmp_path / "peft")
    line = refused("lora_other", tmp_path / "b", "--to", "hf", "--save_dir", tmp_path)
    assert "lora_other" in line


def test_adapters_beside_fused_layers_go_to_peft_and_back(tmp_path):
    """GLM's gate_up_proj is two layers here. Without its weights, nobody knows how many rows are gate's."""
    shape = dict(rotary_fraction=0.5, rope_interleaved=True, post_norms=True, tie_word_embeddings=False)
    model = small_model(**shape)
    tokenizer = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    base = save_weights(tmp_path / "glm_32.pth", model, tokenizer=tokenizer, lineage=[])
    settings = LoRASettings(rank=4, alpha=16.0)
    add_lora(model, settings)
    for layer in adapted(model).values():
        torch.nn.init.normal_(layer.adapter("default").B, std=0.2)
    about = dict(base=dict(path=str(base), hash=load_weights(base).hash), tokenizer=tokenizer, lineage=[])
    path = save_adapter(tmp_path / "lora_32.pth", model, settings, **about)
    convert(path, tmp_path / "peft", "--to", "peft")
    values = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert "gate_up_proj" in values["target_modules"] and "gate_proj" not in values["target_modules"]
    convert(tmp_path / "peft", tmp_path / "again.pth", "--to", "pth", "--weight", base)
    again = load_adapter(tmp_path / "again.pth")
    assert again.state.keys() == load_adapter(path).state.keys()
    found = again.apply(load_weights(base).build())
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)


# ---- mistakes


def test_mistakes_end_in_one_line(source, adapter, tmp_path):
    path, lora = source[0], adapter[0]
    out = tmp_path / "out"
    for words, named in [
        ((path, out), "--to missing: convert.py SRC DST --to hf|minimind"),
        ((path, out, "--to", "gguf"), "writes one file, whose name must end with .gguf"),
        ((path, out, "--to", "hf", "--dtype", "q8_0"), "--dtype q8_0: only gguf has it"),
        ((path, f"{out}.gguf", "--to", "gguf", "--shard_size", "2"), "--shard_size: only hf is written in parts"),
        ((path, out, "--to", "peft"), "whole weights, but --to peft is for adapters; write --to hf"),
        ((lora, out, "--to", "hf"), f"--lora_path {lora}"),
        ((tmp_path / "nothing", out, "--to", "hf"), "no such file or directory"),
        ((path, path, "--to", "pth", "--overwrite"), "is what is converted; choose another name"),
        ((path, path.parent / "x.pth" / "y.pth", "--to", "pth"), ""),
    ][:-1]:
        assert named in refused(*words)
    assert entries(tmp_path) == []


def test_nothing_is_replaced_unasked(source, tmp_path):
    """And a folder that holds anything else never, so that --overwrite cannot empty somebody's home."""
    path, target = source[0], tmp_path / "hf"
    convert(path, target, "--to", "hf", "--no_verify")
    (target / "config.json").write_text("{}", encoding="utf-8")
    assert "is there already; choose another name, or replace it with --overwrite" in refused(
        path, target, "--to", "hf"
    )
    assert (target / "config.json").read_text(encoding="utf-8") == "{}"
    convert(path, target, "--to", "hf", "--overwrite")
    assert load_weights(target).hash == load_weights(path).hash
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    line = refused(path, target, "--to", "hf", "--overwrite")
    assert "holds notes.txt, which no conversion writes" in line and (target / "notes.txt").is_file()
    assert entries(tmp_path)[0] == "chat_template.jinja", "no hidden folder is left"


def test_weights_that_are_no_numbers(source, tmp_path):
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    path = save_weights(tmp_path / "bad_32.pth", model, tokenizer={}, lineage=[])
    line = refused(path, tmp_path / "hf", "--to", "hf", "--tokenizer_path", TOKENIZER.path)
    assert "bad_32.pth" in line and "NaN" in line and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "to, name",
    [("hf", "a"), ("gguf", "a.gguf"), ("pth", "a.pth"), ("safetensors", "a.safetensors"), ("minimind", "a.pth")],
)
def test_a_full_disk_leaves_nothing(source, tmp_path, to, name):
    """No file may grow beyond 300 kB, which stops each writer in its midst; the model has 800 kB."""
    resource = pytest.importorskip("resource")
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        line = refused(source[0], tmp_path / name, "--to", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert line.startswith(f"error: {tmp_path / name}: ") and ("File too large" in line or "the disk is full" in line)
    assert entries(tmp_path) == []


def test_a_disk_that_is_full_when_it_is_flushed(source, tmp_path, monkeypatch):
    sync = os.fsync

    def full(descriptor):
        if len(entries(tmp_path)) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert f"{tmp_path / 'a'}: the disk is full" in refused(source[0], tmp_path / "a", "--to", "hf")
    assert entries(tmp_path) == []


def test_what_is_read_again_must_be_the_same_model(source, tmp_path, monkeypatch):
    """A layout with q's rows in the wrong order loads, and answers noise."""
    from model.interop import gguf

    monkeypatch.setattr(gguf, "to_halves", lambda weight, heads: weight)
    line = refused(source[0], tmp_path / "a.gguf", "--to", "gguf")
    assert "a.gguf: not written: read again, the logits differ by" in line and entries(tmp_path) == []
