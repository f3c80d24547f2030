"""Adapters that somebody else has written: what is wrong with one is named, and nothing is allocated for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.console import UserError
from model.adapter import load_adapter
from model.interop.peft import CONFIG, TENSORS, save_peft
from model.lora import LoRASettings, add_lora, lora_state
from tests.helpers.models import tiny_model

NAN = float("nan")


@pytest.fixture
def folder(tmp_path):
    model, settings = tiny_model(), LoRASettings(rank=2, targets=("q_proj",))
    add_lora(model, settings)
    save_peft(tmp_path, settings.to_dict(), lora_state(model), dict(path=None, hash=None), 2)
    return tmp_path


def test_a_directory_is_replaced_whole_or_not_at_all(folder, monkeypatch):
    """A full disk between its two files left the new matrices with the old alpha."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    settings = LoRASettings(rank=2, alpha=99.0, targets=("q_proj",))
    state = {name: tensor + 1 for name, tensor in load_adapter(folder).state.items()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_peft(folder, settings.to_dict(), state, dict(path=None, hash=None), 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    save_peft(folder, settings.to_dict(), state, dict(path=None, hash=None), 2)
    assert load_adapter(folder).settings.alpha == 99 and sorted(path.name for path in folder.iterdir()) == [
        CONFIG,
        TENSORS,
    ]


def change(folder, tensors=None, metadata=None, **settings):
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | settings
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    save_file(tensors or load_file(folder / TENSORS), folder / TENSORS, metadata=metadata)


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(r="x"), "rank must be a whole number from 1 on, not 'x'"),
        (dict(r=0), "rank must be a whole number from 1 on, not 0"),
        (dict(r=None), "rank must be a whole number from 1 on, not None"),
        (dict(r=True), "rank must be a whole number from 1 on, not True"),
        (dict(r=10**12), r"says rank 1000000000000, but .*q_proj.A is \(2, 24\)"),
        (dict(r=1), r"says rank 1, but .*q_proj.A is \(2, 24\)"),
        (dict(rank_pattern={"q_proj": 10**12}), "says rank 1000000000000, but"),
        (dict(rank_pattern=[1]), "rank_pattern must be a dictionary of positive numbers"),
        (dict(rank_pattern={"q_proj": "x"}), "rank_pattern must be a dictionary of positive numbers"),
        (dict(alpha_pattern={"q_proj": 0}), "alpha_pattern must be a dictionary of positive numbers"),
        (dict(lora_alpha=NAN), "alpha must be a number, not nan"),
        (dict(lora_alpha="a"), "alpha must be a number, not 'a'"),
        (dict(lora_alpha=None), "alpha must be a number, not None"),
        (dict(lora_dropout=7), "dropout must be at least 0 and below 1, not 7"),
    ],
)
def test_impossible_settings_are_named(folder, settings, problem):
    change(folder, **settings)
    with pytest.raises(UserError, match=f"{CONFIG}: .*{problem}"):
        load_adapter(folder)


def test_nan_is_named(folder):
    tensors = load_file(folder / TENSORS)
    next(iter(tensors.values()))[0, 0] = NAN
    change(folder, tensors)
    with pytest.raises(UserError, match="q_proj holds NaN or infinity: the adapter is damaged"):
        load_adapter(folder).apply(tiny_model())


@pytest.mark.parametrize("bits, known", [("4", 4), ("8", 8), ("5", None), ("abc", None), ("", None)])
def test_only_bits_that_there_are_count(folder, bits, known):
    change(folder, metadata={"base_bits": bits})
    assert load_adapter(folder).bits == known


def test_a_rank_that_is_not_that_of_the_settings(folder):
    """In our own file, where both stand."""
    adapter = load_adapter(folder)
    adapter.settings = LoRASettings(rank=4)
    with pytest.raises(UserError, match=r"q_proj is .* here, and there \(24, 2\) x \(2, 24\), of rank 4"):
        adapter.apply(tiny_model())
    assert torch.is_tensor(load_adapter(folder).state["model.layers.0.self_attn.q_proj.A"])
