"""One line per setting: flags, checks and files follow from it."""

import pytest

from model.config import ModelConfig, architecture_options
from trainer.train_pretrain import PretrainConfig


def test_flags_are_the_marked_settings():
    flags = {name: kind for name, kind, _ in architecture_options()}
    assert list(flags) == (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings".split()
    )
    config = PretrainConfig(num_attention_heads=0)
    assert all(getattr(PretrainConfig(), name) is None for name in flags)
    assert config.problems() == ["--num_attention_heads 0: must be at least 1"]


def test_a_setting_that_is_not_used_leaves_no_trace_in_files():
    """Versions from before sliding_window refuse a file that names it."""
    plain = ModelConfig().to_dict()
    assert plain["rope_scaling"] is None and len(plain) == 20
    unused = {"sliding_window", "layer_types", "rotary_fraction", "rope_local_theta", "rope_interleaved", "post_norms"}
    assert not unused & plain.keys()
    used = ModelConfig(sliding_window=8, rotary_fraction=0.5).to_dict()
    assert used == plain | dict(sliding_window=8, rotary_fraction=0.5)


def test_windows_of_layers():
    kinds = ["sliding_attention", "full_attention"]  # a list, as files have it
    config = ModelConfig(num_hidden_layers=2, sliding_window=8, layer_types=kinds)
    assert config.windows == (8, None) and config == ModelConfig.from_dict(config.to_dict())
    assert ModelConfig(num_hidden_layers=2, sliding_window=8).windows == (8, 8)
    assert ModelConfig(num_hidden_layers=2).windows == (None, None)


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(vocab_size=0, hidden_size=-1), "vocab_size must be at least 1, not 0; hidden_size must be at least 1"),
        (dict(sliding_window=0), "sliding_window must be at least 1"),
        (dict(head_dim=7), "head_dim 7 must be even"),
        (
            dict(hidden_size=100, num_attention_heads=4, num_key_value_heads=2),
            "head_dim 25, hidden_size 100 / num_attention_heads 4, must be even",
        ),
        (dict(head_dim=8, rotary_fraction=0.4), "rotary_fraction 0.4 of head_dim 8 is 3, which must be even"),
        (dict(head_dim=8, rotary_fraction=0.1), "is 0, which must be even and positive"),
        (dict(rotary_fraction=1.5), "rotary_fraction 1.5 must lie above 0"),
        (dict(layer_types=("full_attention",)), "layer_types names 1 of 2 layers"),
        (dict(layer_types=("full_attention", "linear_attention")), "linear_attention is not one of full_attention"),
        (dict(layer_types=("sliding_attention",) * 2), "there is no sliding_window"),
        (dict(rope_local_theta=1e4), "rope_local_theta is for layers with a sliding_window"),
        # from somebody's file: the first two were tracebacks, the third was built for hours
        (dict(hidden_size="512"), "hidden_size must be a whole number, not '512'"),
        (
            dict(vocab_size=3.5, num_experts=True),
            "vocab_size must be a whole number, not 3.5; num_experts must be a whole",
        ),
        (dict(num_hidden_layers=10**9), "num_hidden_layers 1000000000 is too many"),
        (dict(hidden_size=10**12), "hidden_size 1000000000000 is too wide"),
        (dict(max_position_embeddings=10**18), "max_position_embeddings 1e\\+18 is too many"),
        (dict(rope_theta=0), "rope_theta must be above 0"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps must be at least 0 and finite, not nan"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings must be true or false, not 1"),
        (dict(rope_scaling=[1]), "rope_scaling must be a dictionary"),
        (
            dict(rope_scaling=dict(rope_type="linear", factor=0)),
            "rope_scaling's factor must be a positive number, not 0",
        ),
    ],
)
def test_impossible_settings_are_named(changes, problem):
    with pytest.raises(ValueError, match=f"this model cannot be built: .*{problem}"):
        ModelConfig(**{"num_hidden_layers": 2, **changes})
