"""Weights files: what is in them, which one a name means, and what is refused."""

import errno
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from common.files import atomic_file
from model.checkpoint import find_weights, hash_of, load_weights, same_weights, save_weights, weights_name
from model.config import ModelConfig
from model.export import save_hf
from model.interop.hf import config_from_hf
from model.transformer import CausalLM
from trainer.run import resume

SHAPE = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def build(**changes) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ModelConfig(**{**SHAPE, **changes}))


def save(path, **changes):
    return save_weights(
        path, build(**changes), tokenizer={"path": "tokenizer", "hash": "1f"}, lineage=[{"stage": "pretrain"}]
    )


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_experts": 3}])
def test_round_trip(tmp_path, changes):
    path = save(tmp_path / "a.pth", **changes)
    checkpoint = load_weights(path)
    assert checkpoint.lineage == [{"stage": "pretrain"}] and checkpoint.tokenizer["hash"] == "1f"
    tokens = torch.randint(50, (1, 9))
    with torch.no_grad():
        assert torch.equal(checkpoint.build()(tokens).logits, build(**changes)(tokens).logits)


def test_tied_weights_are_stored_once_and_found_under_either_name(tmp_path):
    state = dict(load_weights(save(tmp_path / "a.pth")).state)
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    both = {**state, "model.embed_tokens.weight": state["lm_head.weight"]}  # as MiniMind does
    torch.save(both, tmp_path / "both.pth")
    assert load_weights(tmp_path / "both.pth").config.tie_word_embeddings
    build().load_state_dict(state)


def test_the_hash_belongs_to_the_numbers(tmp_path):
    a, b, c = (load_weights(save(tmp_path / f"{name}.pth")) for name in "abc")
    c.state = dict(c.state)
    c.state["model.norm.weight"][0] += 1
    assert a.hash == b.hash != c.hash


def test_the_hash_belongs_to_the_config_too(tmp_path):
    """With another rope_theta the same tensors are another model: its adapters and teachers were taken for its own."""
    path = save(tmp_path / "a.pth")
    plain, theta = load_weights(path), load_weights(save(tmp_path / "theta.pth", rope_theta=500.0))
    longer = load_weights(save(tmp_path / "longer.pth", max_position_embeddings=64, router_aux_loss_coef=0.5))
    whole = load_weights(save(tmp_path / "whole.pth", rope_theta=1_000_000))
    exported = load_weights(save_hf(tmp_path / "hf", plain, tmp_path, stop_ids={2}))
    assert hash_of(plain.state) == hash_of(theta.state)
    assert not same_weights(plain.hash, theta.hash)
    assert plain.hash == longer.hash == whole.hash == exported.hash
    old = hash_of(plain.state)  # what version 0.1.0 recorded
    assert same_weights(plain.hash, old) and same_weights(old, theta.hash) and same_weights(None, None)
    theta.state = dict(theta.state)
    theta.state["model.norm.weight"][0] += 1
    assert not same_weights(old, hash_of(theta.state)) and not same_weights(plain.hash, None)


def test_what_older_versions_recorded_still_matches(tmp_path):
    """States and weights files name their parent by the hash of its tensors alone."""
    resume.write_state(tmp_path / "states" / "run" / "step_00000001", {}, dict(identity=dict(parent="ab", seed=1)))
    for parent, found in (("ab.cd", True), ("ab", True), ("ee.cd", False)):
        identity = dict(parent=parent, seed=1)
        if found:
            assert resume.find_state(tmp_path / "states", "auto", identity, print)
        else:
            with pytest.raises(ValueError, match="parent was"):
                resume.find_state(tmp_path / "states", "auto", identity, print)
    entry = dict(stage="pretrain", data="d", parent="ab", seed=1, steps=2)
    path = save_weights(tmp_path / "a.pth", build(), tokenizer={}, lineage=[entry])
    assert resume.is_of(entry | dict(parent="ab.cd"), path) and not resume.is_of(entry | dict(parent="ee.cd"), path)


def test_the_hash_stays_when_the_tensors_were_let_go(tmp_path):
    """The engine keeps the parent to name it in what it saves; its tensors were a second model in memory all run."""
    checkpoint = load_weights(save(tmp_path / "a.pth"))
    checkpoint.release()
    assert not checkpoint.state and checkpoint.hash == load_weights(tmp_path / "a.pth").hash


def test_a_turned_bit_is_noticed(tmp_path):
    """The container stays readable and torch checks nothing inside: the model would answer a little worse, for ever."""
    path = save(tmp_path / "a.pth")
    content, numbers = path.read_bytes(), load_weights(path).state["model.norm.weight"].numpy().tobytes()
    place = content.index(numbers)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert torch.load(path)["model"]["model.norm.weight"].isfinite().all()
    with pytest.raises(ValueError, match="a.pth: damaged"):
        load_weights(path)


def test_a_name_means_the_newest_file_of_the_first_folder(tmp_path, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other"
    for age, path in enumerate(
        [out / "sft_16.pth", out / "sft_32_moe.pth", out / "sft_long_64.pth", other / "sft_64.pth"]
    ):
        os.utime(save(path), (1000 + age, 1000 + age))
    assert find_weights("sft", out, other).name == "sft_32_moe.pth"
    assert find_weights("sft", out, other, moe=False).name == "sft_16.pth"
    assert find_weights("sft", out, other, hidden_size=64) == other / "sft_64.pth"
    assert find_weights("sft_long", out, other).name == "sft_long_64.pth"
    assert find_weights(str(out / "sft_16.pth"), other) == out / "sft_16.pth"
    with pytest.raises(ValueError, match="no weights called 'dpo'.*there are sft_16.pth"):
        find_weights("dpo", out)
    with pytest.raises(ValueError, match="nowhere/x.pth: no such file"):
        find_weights("nowhere/x.pth", out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"in {out}; "):  # "in out or /.../out"
        find_weights("dpo", "out", out)
    save(out / "lora" / "lora_me_16.pth")
    with pytest.raises(ValueError, match="lora/lora_me_16.pth is an adapter, .* as --lora_name lora_me; to train on"):
        find_weights("lora_me", out)
    save(out / "lora" / "sft_16.pth")
    with pytest.raises(ValueError, match="there are sft_16.pth"):  # it named the adapter, whatever its size
        find_weights("sft", out, hidden_size=512)
    assert load_weights(out).path == out / "sft_long_64.pth"  # a directory: its newest file
    assert weights_name("sft", ModelConfig(**SHAPE, num_experts=2)) == "sft_16_moe.pth"


def test_a_name_is_a_directory_here_only_if_it_holds_weights(tmp_path, monkeypatch):
    """A folder of notes called full_sft in the current directory hid out/full_sft_16.pth."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "out" / "full_sft_16.pth")
    notes = tmp_path / "full_sft"
    notes.mkdir()
    (notes / "config.json").write_text("{}", encoding="utf-8")
    assert find_weights("full_sft", "out").resolve() == path
    assert find_weights("full_sft", "nowhere") == Path("full_sft")  # who loads it says what is wrong with it
    with pytest.raises(ValueError, match="full_sft: config.json: model_type None is not"):
        load_weights(find_weights("full_sft", "nowhere"))
    save_hf(notes, load_weights(path), notes, stop_ids={2})
    assert find_weights("full_sft", "out") == Path("full_sft")
    assert find_weights("./full_sft", "out") == find_weights(str(notes), "out").relative_to(tmp_path)
    (tmp_path / "pretrain").write_text("echo", encoding="utf-8")  # nor does a script of that name
    assert find_weights("pretrain", save(tmp_path / "out" / "pretrain_16.pth").parent).name == "pretrain_16.pth"


@pytest.mark.parametrize("name", ("pre[v1]", "a*", "[!x]"))
def test_names_with_brackets_are_found_again(name, tmp_path):
    if sys.platform == "win32" and "*" in name:
        pytest.skip("not a name there")
    path = save(tmp_path / weights_name(name, ModelConfig(**SHAPE)))
    save(tmp_path / "prev_16.pth")
    assert find_weights(name, tmp_path) == path


class Code:
    """What a malicious file would hold: unpickling it runs a function."""

    def __reduce__(self):
        return (os.mkdir, ("it-was-run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.embed_tokens.weight": torch.zeros(2), "x": Code()}, tmp_path / "torch.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"x": Code()}))
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"x": Code()}, protocol=2))
    for name, reason in (
        ("torch", "it holds code .*mkdir"),
        ("old", "it holds code .*mkdir"),
        ("pickle", "it is damaged, or"),
    ):
        with pytest.raises(ValueError, match=f"{name}.pth: refused: {reason}"):
            load_weights(tmp_path / f"{name}.pth")
    assert not (tmp_path / "it-was-run").exists()


def test_every_truncation_and_other_files_end_in_one_line(tmp_path):
    whole = save(tmp_path / "a.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.pth: (truncated|refused)") as error:
            load_weights(cut)
        assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("list.pth", "other.pth"):
        with pytest.raises(ValueError, match=f"{name}: not (a weights file|weights of a language model)"):
            load_weights(tmp_path / name)


def test_weights_of_another_shape_are_named(tmp_path):
    checkpoint = load_weights(save(tmp_path / "a.pth"))
    checkpoint.state = {name: tensor for name, tensor in checkpoint.state.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match="do not fit the architecture.*model.norm.weight"):
        checkpoint.build()


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pth")
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        save(path, num_hidden_layers=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_atomic_leaves_nothing_behind_when_the_writer_fails(tmp_path):
    with pytest.raises(KeyError):
        with atomic_file(tmp_path / "x") as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise KeyError
    assert not list(tmp_path.iterdir())


def test_configurations_that_cannot_work():
    with pytest.raises(ValueError, match="num_attention_heads 8 is not a multiple of num_key_value_heads 3"):
        ModelConfig(num_key_value_heads=3)
    with pytest.raises(ValueError, match="unknown model setting 'hiden_size', did you mean 'hidden_size'"):
        ModelConfig.from_dict({"hiden_size": 3})
    with pytest.raises(ValueError, match="rope_scaling of kind yarn lacks factor"):
        ModelConfig(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 10})
    with pytest.raises(ValueError, match="no preset 'large': choose one of nano"):
        ModelConfig.preset("large")
    with pytest.raises(ValueError, match="model_type 'gpt2' is not supported"):
        config_from_hf({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="not supported: attention_bias=True"):
        config_from_hf({"model_type": "llama", "attention_bias": True})


@pytest.mark.parametrize("extra", (dict(truncate=False), dict(partial_rotary_factor=0.5)))
def test_rope_scaling_that_we_do_not_compute_is_refused(extra):
    """gpt-oss's additions to YaRN: read over, the logits were wrong by 4 and more."""
    values = dict(
        model_type="llama",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=None, truncate=True)
    assert config_from_hf(values | dict(rope_scaling=yarn)).rope_scaling["factor"] == 4
    (name,) = extra
    with pytest.raises(ValueError, match=f"RoPE scaling not supported: {name}="):
        config_from_hf(values | dict(rope_scaling=yarn | extra))
