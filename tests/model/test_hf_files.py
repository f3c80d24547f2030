"""Which files of a Hugging Face directory are read: those of the index, and what is missing is named."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from common.console import UserError
from common.files import ROOT
from model.adapter import load_adapter
from model.checkpoint import Checkpoint, load_weights
from model.config import ModelConfig
from model.export import SHARD_BYTES, save_hf
from model.interop.hf import config_from_hf
from model.interop.hf_files import INDEX, open_tensors
from model.transformer import CausalLM
from tokenizer.text import Tokenizer

SHAPE = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def export(folder, seed=0, shard_bytes=SHARD_BYTES, **changes):
    """A directory with one model.safetensors, unless it is larger than that -> its tensors."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(**{**SHAPE, **changes}))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_hf(folder, Checkpoint(folder, state, model.config), folder, stop_ids={2}, shard_bytes=shard_bytes)
    return dict(load_weights(folder).state)


def write(path, tensors):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def shard(folder, state):
    """In place of model.safetensors: two shards and their index."""
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    places = {name: (ONE, TWO)[i % 2] for i, name in enumerate(names)}
    for file in (ONE, TWO):
        write(folder / file, {name: state[name] for name in names if places[name] == file})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def assert_same(found, expected):
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_files_that_the_index_does_not_name_are_not_read(tmp_path):
    """All *.safetensors were merged: shards that an earlier export had left came last and replaced the right tensors,
    and the loss was that of a model that knows nothing."""
    state = export(tmp_path)
    shard(tmp_path, state)
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for name in ("model-00003-of-00003.safetensors", "model.safetensors", "consolidated.safetensors"):
        write(tmp_path / name, wrong)
    assert_same(load_weights(tmp_path).state, state)


def test_without_an_index(tmp_path):
    """One file is enough, and left-over shards beside it are not read; nor are other programs' names ever."""
    state = export(tmp_path)
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    write(tmp_path / TWO, wrong)
    assert_same(load_weights(tmp_path).state, state)
    for name in (TWO, "model.safetensors"):
        (tmp_path / name).unlink()
    for name in ("consolidated.safetensors", "consolidated-00001-of-00001.safetensors", "adapter_model.safetensors"):
        write(tmp_path / name, wrong)
    with pytest.raises(
        ValueError, match="no .*safetensors or .*bin beside config.json, only adapter_model.safetensors"
    ):
        load_weights(tmp_path)
    write(tmp_path / "weights.safetensors", state)
    assert_same(load_weights(tmp_path).state, state)
    write(tmp_path / "weights.fp16.safetensors", state)
    with pytest.raises(ValueError, match="is in weights.safetensors and in another"):
        load_weights(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    state = export(tmp_path)
    shard(tmp_path, state)
    (tmp_path / TWO).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{TWO}: missing, though {INDEX} names it"):
        load_weights(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=f"{TWO} is missing"):
        load_weights(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / TWO)
    assert_same(load_weights(tmp_path).state, state)

    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, ONE)}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{ONE}: has no model.*, which {INDEX} says is in it"):
        load_weights(tmp_path)


@pytest.mark.parametrize("content", ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'))
def test_a_broken_index_is_named(content, tmp_path):
    export(tmp_path)
    (tmp_path / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=INDEX):
        load_weights(tmp_path)


def test_an_export_replaces_an_older_one_in_shards(tmp_path):
    shard(tmp_path, export(tmp_path, seed=0))
    new = export(tmp_path, seed=1)
    assert_same(load_weights(tmp_path).state, new)


def names(folder):
    return sorted(path.name for path in folder.glob("*.safetensors*"))


def theirs(folder):
    """As transformers reads: one file first, then the index."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).state_dict()


def test_an_export_in_shards_replaces_an_older_one(tmp_path):
    """transformers took the old model.safetensors, which lay beside the new shards and their index."""
    export(tmp_path, seed=0)
    new = export(tmp_path, seed=1, shard_bytes=1000)
    for found in (load_weights(tmp_path).state, theirs(tmp_path)):
        assert torch.equal(found["model.norm.weight"], new["model.norm.weight"])
        assert torch.equal(found["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert names(tmp_path) == [ONE, TWO, INDEX]
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):  # somebody else's
        write(tmp_path / name, new)
    export(tmp_path, seed=1, shard_bytes=1000, num_hidden_layers=2)
    three = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert names(tmp_path) == ["consolidated.safetensors", *three, "model.fp16.safetensors", INDEX]
    export(tmp_path, seed=0)
    assert names(tmp_path) == ["consolidated.safetensors", "model.fp16.safetensors", "model.safetensors"]


@pytest.mark.parametrize("before, after", [(SHARD_BYTES, 1000), (1000, SHARD_BYTES)])
def test_an_export_that_is_interrupted_leaves_a_whole_model(tmp_path, monkeypatch, before, after):
    """After each file that is written or removed: the old tensors or the new ones, for us and for transformers."""
    new = export(tmp_path / "new", seed=1)["model.embed_tokens.weight"]
    old = export(tmp_path / "old", seed=0, shard_bytes=before)["model.embed_tokens.weight"]
    states = []

    def look(folder):
        for found in (load_weights(folder).state, theirs(folder)):
            weight = found["model.embed_tokens.weight"]
            states.append("old" if torch.equal(weight, old) else "new" if torch.equal(weight, new) else "mixed")

    for name in ("replace", "unlink"):
        change = getattr(os, name)

        def watched(path, *rest, change=change, **more):
            change(path, *rest, **more)
            look(tmp_path / "old")

        monkeypatch.setattr(os, name, watched)
    export(tmp_path / "old", seed=1, shard_bytes=after)
    assert set(states) == {"old", "new"} and states[-2:] == ["new", "new"]


def test_a_head_of_its_own_counts_more_than_tie_word_embeddings(tmp_path):
    """The head came second and overwrote the embedding. transformers 5 does not tie either if the two differ."""
    state = export(tmp_path, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    checkpoint = load_weights(tmp_path)
    assert not checkpoint.config.tie_word_embeddings
    model = checkpoint.build()
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, state["model.embed_tokens.weight"])

    write(tmp_path / "model.safetensors", state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    assert load_weights(tmp_path).config.tie_word_embeddings

    tied = CausalLM(ModelConfig(**SHAPE))
    with pytest.raises(RuntimeError, match="lm_head.weight differs from model.embed_tokens.weight"):
        tied.load_state_dict(state)


@pytest.mark.parametrize("content", ("[1]", '"llama"', "null"))
def test_a_config_that_is_no_dictionary_is_an_error_in_one_line(content, tmp_path):
    export(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json: holds a (list|str|NoneType), not the settings of a model"):
        load_weights(tmp_path)


@pytest.mark.parametrize("content", ('{"model_type": ["llama"]}', '{"model_type": "llama", "rope_scaling": [1]}'))
def test_a_config_of_another_kind_is_named(content, tmp_path):
    """Each ended in a traceback."""
    export(tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="config.json: a setting is missing or of another kind"):
        load_weights(tmp_path)


def test_an_index_does_not_lead_out_of_the_directory(tmp_path):
    """Also not to a file that is there."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({}, tmp_path / "other.safetensors")
    index = dict(weight_map={"model.norm.weight": "../other.safetensors"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"'\.\./other\.safetensors' is not the name of a file beside it"):
        open_tensors(folder)


NO_JSON = dict(bytes=b"\xff\xfe\x00", brackets=b"[" * 100_000, digits=b"[" + b"9" * 5000 + b"]", half=b"[")


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json", "generation_config.json"])
def test_what_is_no_json_is_named(name, content, tmp_path):
    """Each of these was a traceback somewhere: Python's reader fails in four ways."""
    export(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        load_weights(tmp_path)
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_neither_is_a_tokenizer(name, content, tmp_path):
    for file in (ROOT / "tokenizer").glob("*.j*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    if name == "tokenizer.json" or not content.isascii():
        with pytest.raises(UserError, match=f"{name}.*: not (JSON|a text)"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [*NO_JSON.values(), b"[1]"], ids=[*NO_JSON, "list"])
def test_nor_is_it_an_adapter(content, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match="adapter_config.json"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -2.0, 0, "4"])
def test_an_impossible_factor_of_yarn_is_named(factor, tmp_path):
    export(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    values["rope_scaling"] = dict(rope_type="yarn", factor=factor)
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match="rope_scaling's factor must be a positive number"):
        load_weights(tmp_path)


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor"])
def test_zero_is_not_taken_for_unsaid(key):
    """It was read as if the setting were absent."""
    rope = dict(rope_type="default", rope_theta=1e4) | {key: 0}
    values = dict(SHAPE, model_type="glm", intermediate_size=32, head_dim=8, max_position_embeddings=64)
    with pytest.raises(UserError, match="rope_theta must be above 0|rotary_fraction 0"):
        config_from_hf(values | dict(rope_parameters=rope))
