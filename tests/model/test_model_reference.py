"""Our logits against those of others: transformers' own models, and MiniMind's checkpoints of two generations."""

import json

import pytest
import torch

from model.checkpoint import load_weights
from model.config import ModelConfig
from model.interop.hf import config_from_hf, config_to_hf
from model.interop.minimind import config_from_minimind
from model.transformer import CausalLM

TINY = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
ROPES = dict(  # one for each type of layer, as transformers 5 writes them
    full_attention=dict(LLAMA3, rope_theta=1e4), sliding_attention=dict(rope_type="default", rope_theta=20.0)
)
FAMILIES = {
    "llama": ("Llama", dict(head_dim=10, rope_theta=10000.0)),
    "llama untied": ("Llama", dict(tie_word_embeddings=False)),
    "llama3 rope": ("Llama", dict(rope_parameters=dict(LLAMA3, rope_theta=5e5))),
    "linear rope": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=1e4))),
    "yarn rope": (
        "Llama",
        dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e4)),
    ),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2, windows from layer 1 on": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
    ),
    "qwen3, windows in some layers": (
        "Qwen3",
        dict(
            head_dim=16,
            use_sliding_window=True,
            sliding_window=16,
            layer_types=MIXED_LAYERS,
        ),
    ),
    "qwen3 moe, windows": (
        "Qwen3Moe",
        dict(
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            use_sliding_window=True,
            sliding_window=16,
        ),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3 moe": (
        "Qwen3Moe",
        dict(head_dim=8, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "qwen3 moe, plain weights": (
        "Qwen3Moe",
        dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    family, changes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():  # biases and norms start at 0 and 1, which would hide a mistake in them
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    theirs.save_pretrained(tmp_path)
    ours = load_weights(tmp_path).build()

    tokens = torch.randint(1, TINY["vocab_size"], (2, 200))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)

    written = config_to_hf(ours.config)  # and what we write is the same model again, for them and for us
    assert config_from_hf(written) == ours.config
    again = getattr(transformers, f"{family}Config")(**written)
    same = "layer_types sliding_window use_sliding_window num_key_value_heads rope_parameters num_experts".split()
    assert written["model_type"] == config.model_type
    assert {key: getattr(again, key, None) for key in same} == {key: getattr(config, key, None) for key in same}


@pytest.mark.parametrize(
    "family, changes, ours",
    [
        ("Mistral", dict(sliding_window=16), dict(sliding_window=16)),
        (
            "Glm4Moe",  # all layers dense
            dict(head_dim=8, partial_rotary_factor=0.5, attention_bias=True, first_k_dense_replace=3),
            dict(head_dim=8, rotary_fraction=0.5, attention_bias=True),
        ),
        (
            "Glm4Moe",
            dict(
                head_dim=16,
                attention_bias=True,
                first_k_dense_replace=3,
                rope_parameters=dict(
                    rope_type="yarn",
                    factor=4.0,
                    original_max_position_embeddings=64,
                    rope_theta=1e4,
                    partial_rotary_factor=0.25,
                ),
            ),
            dict(
                head_dim=16,
                rotary_fraction=0.25,
                attention_bias=True,
                rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
            ),
        ),
        (
            "Mellum",  # all layers dense
            dict(
                head_dim=8,
                sliding_window=16,
                layer_types=MIXED_LAYERS,
                mlp_layer_types=["dense"] * 3,
                rope_parameters=ROPES,
            ),
            dict(
                head_dim=8,
                qk_norm=True,
                sliding_window=16,
                layer_types=MIXED_LAYERS,
                rope_scaling=LLAMA3,
                rope_local_theta=20.0,
            ),
        ),
    ],
    ids=("mistral", "glm4", "glm4 yarn", "mellum"),
)
def test_windows_and_ropes_equal_families_that_are_not_loaded_yet(family, changes, ours):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    shape = {key: value for key, value in TINY.items() if key != "pad_token_id"}
    model = CausalLM(
        ModelConfig(**shape, **ours, tie_word_embeddings=False, rms_norm_eps=config.rms_norm_eps, rope_theta=1e4)
    )
    model.load_state_dict(theirs.state_dict())
    tokens = torch.randint(1, TINY["vocab_size"], (2, 200))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_rope_for_each_type_of_layer_is_read():
    """No family that is loaded has one yet, so this is Qwen3 with Gemma 3's two ways to write it."""
    windows = dict(use_sliding_window=True, sliding_window=16, layer_types=MIXED_LAYERS)
    values = dict(TINY, model_type="qwen3", **windows)
    config = config_from_hf(values | dict(rope_parameters=ROPES))
    assert (config.rope_theta, config.rope_local_theta, config.rope_scaling) == (1e4, 20.0, LLAMA3)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="rope_local_theta None"):  # transformers would compute something else
        config_to_hf(config)
    stretched = ROPES | dict(sliding_attention=dict(rope_type="linear", factor=2.0, rope_theta=20.0))
    with pytest.raises(ValueError, match="RoPE scaling of sliding layers not supported: .*linear"):
        config_from_hf(values | dict(rope_parameters=stretched))


@pytest.mark.parametrize(
    "family, left_out",
    (
        ("Llama", ("tie_word_embeddings", "rms_norm_eps", "num_key_value_heads")),
        ("Qwen3Moe", ("tie_word_embeddings", "rms_norm_eps", "norm_topk_prob")),
    ),
)
def test_what_a_config_does_not_say_is_what_transformers_takes_it_for(family, left_out, tmp_path):
    """Configs of older versions lack keys. With our own defaults an untied head was silently tied."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8) if "Moe" in family else {}
    values = {key: value for key, value in (TINY | moe).items() if key not in left_out}
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k not in left_out}))
    tokens = torch.randint(1, TINY["vocab_size"], (2, 50))
    with torch.no_grad():
        logits = load_weights(tmp_path).build()(tokens).logits
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [f"minimind{g}_{kind}" for g in (2, 3) for kind in ("dense", "moe", "yarn")])
def test_logits_equal_minimind(name, shared):
    from safetensors.torch import load_file

    folder = shared / "fixtures"
    config = config_from_minimind(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    checkpoint = load_weights(folder / f"{name}.pth")
    checkpoint.config = config
    expected = load_file(folder / f"{name}.logits.safetensors")
    with torch.no_grad():
        logits = checkpoint.build()(expected["input_ids"]).logits
    if logits.shape != expected["logits"].shape:  # the long file keeps every 50th position
        logits = logits[:, ::50]
    torch.testing.assert_close(logits, expected["logits"].float(), atol=1e-4, rtol=1e-4)


def test_a_folder_of_minimind_is_read_with_its_own_config(shared, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shared / "fixtures"
    values = json.loads((folder / "minimind2_dense.json").read_text(encoding="utf-8")) | dict(model_type="minimind")
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    state = {name: tensor.clone() for name, tensor in load_weights(folder / "minimind2_dense.pth").state.items()}
    save_file(state, tmp_path / "model.safetensors")
    expected = load_file(folder / "minimind2_dense.logits.safetensors")
    with torch.no_grad():
        logits = load_weights(tmp_path).build()(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("generation", (2, 3))
def test_architecture_is_read_off_a_bare_state_dict(generation, shared):
    """MiniMind's files hold tensors only. All but the number of heads (without q_norm) stands in their shapes."""
    for kind in ("dense", "moe"):
        path = shared / "fixtures" / f"minimind{generation}_{kind}"
        stated = config_from_minimind(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))).to_dict()
        found = load_weights(path.with_suffix(".pth")).config.to_dict()
        unknowable = {"max_position_embeddings"}
        if generation == 2:
            unknowable |= {"num_attention_heads", "num_key_value_heads", "head_dim"}
        if kind == "dense":
            unknowable |= {"num_experts_per_tok", "moe_intermediate_size"}
        assert {k: v for k, v in found.items() if k not in unknowable} == {
            k: v for k, v in stated.items() if k not in unknowable
        }
