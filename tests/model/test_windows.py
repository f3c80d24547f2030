"""Which layers have a sliding window, as old and new files say it. transformers reads the same settings."""

import pytest

from model.config import ModelConfig
from model.interop.hf import config_from_hf, config_to_hf
from tests.helpers.models import TINY_SHAPE

SHAPE = {**TINY_SHAPE, "num_hidden_layers": 3, "max_position_embeddings": 512}
CLASSES = dict(mistral="MistralConfig", qwen2="Qwen2Config", qwen3="Qwen3Config", ministral="MinistralConfig")


def theirs(values: dict) -> tuple:
    """The window of each layer, where transformers has one."""
    config = getattr(pytest.importorskip("transformers"), CLASSES[values["model_type"]])(**values)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 3
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


@pytest.mark.parametrize(
    "family, settings, windows",
    [
        ("mistral", {}, (4096,) * 3),
        ("mistral", dict(sliding_window=16), (16,) * 3),
        ("mistral", dict(sliding_window=None), (None,) * 3),  # v0.2 and v0.3; left out, it would be 4,096
        ("qwen2", {}, (None,) * 3),
        ("qwen2", dict(sliding_window=16, max_window_layers=1), (None,) * 3),  # the switch is off where it is absent
        ("qwen2", dict(use_sliding_window=False, sliding_window=16, max_window_layers=1), (None,) * 3),
        ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1), (None, 16, 16)),
        ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=0), (16,) * 3),
        ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=28), (None,) * 3),
        ("qwen2", dict(use_sliding_window=True, sliding_window=16), (None,) * 3),  # from the 28th on
        ("qwen2", dict(use_sliding_window=True, sliding_window=None, max_window_layers=0), (None,) * 3),
        ("qwen3", dict(use_sliding_window=True, sliding_window=16, max_window_layers=2), (None, None, 16)),
        ("ministral", dict(sliding_window=16), (16,) * 3),
    ],
)
def test_which_layers_have_a_window(family, settings, windows):
    values = dict(SHAPE, model_type=family, **settings)
    assert theirs(values) == windows
    assert config_from_hf(values).windows == windows
    assert config_from_hf(values | dict(layer_types=None)).windows == windows


@pytest.mark.parametrize(
    "windows, full",
    [
        ("full sliding sliding", 1),
        ("full full sliding", 2),
        ("sliding sliding sliding", 0),
        ("sliding full sliding", None),  # no number of layers in front says this
        ("full sliding full", None),
    ],
)
def test_older_readers_are_told_too(windows, full):
    """They know no layer_types. A max_window_layers that says something else would be worse than none."""
    kinds = tuple(f"{kind}_attention" for kind in windows.split())
    config = ModelConfig(**SHAPE, attention_bias=True, sliding_window=16, layer_types=kinds)
    values = config_to_hf(config)
    assert values["model_type"] == "qwen2" and values["use_sliding_window"] is True
    assert values["sliding_window"] == 16 and values["layer_types"] == list(kinds)
    assert values.get("max_window_layers") == full
    assert config_from_hf(values).windows == config.windows
    if full is not None:
        old = {name: value for name, value in values.items() if name != "layer_types"}
        assert config_from_hf(old).windows == theirs(old) == config.windows


def test_without_windows_none_is_written():
    values = config_to_hf(ModelConfig(**SHAPE, attention_bias=True))
    assert not {"sliding_window", "use_sliding_window", "layer_types", "max_window_layers"} & values.keys()


def test_a_window_that_no_layer_has_does_not_become_mistrals():
    """Written as mistral without a word about windows, it was read with one of 4,096 in all layers."""
    kinds = ("full_attention",) * 3
    values = config_to_hf(ModelConfig(**SHAPE, sliding_window=16, layer_types=kinds))
    assert values["model_type"] == "mistral"
    assert config_from_hf(values).windows == theirs(values) == (None,) * 3
