"""Our logits against those of others: transformers' own models, and MiniMind's checkpoints of two generations."""

import json

import pytest
import torch

from common.console import UserError
from model.checkpoint import load_weights
from model.config import ModelConfig
from model.interop.hf import config_from_hf, config_to_hf, hf_tensors
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
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e4)
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
ROPES = dict(  # one for each type of layer, as transformers 5 writes them
    full_attention=dict(LLAMA3, rope_theta=1e4), sliding_attention=dict(rope_type="default", rope_theta=20.0)
)
FAMILIES = {
    "llama": ("Llama", dict(head_dim=10, rope_theta=10000.0)),
    "llama untied": ("Llama", dict(tie_word_embeddings=False)),
    "llama3 rope": ("Llama", dict(rope_parameters=dict(LLAMA3, rope_theta=5e5))),
    "linear rope": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=1e4))),
    "yarn rope": ("Llama", dict(rope_parameters=YARN)),
    "yarn rope, its temperature given": ("Qwen3", dict(head_dim=16, rope_parameters=dict(YARN, attention_factor=0.8))),
    "llama, one key head": ("Llama", dict(num_key_value_heads=1)),
    "llama, no shared keys": ("Llama", dict(num_key_value_heads=6, tie_word_embeddings=True)),
    "mistral, windows": ("Mistral", dict(head_dim=12, sliding_window=16)),
    "mistral, windows and yarn, one key head": (
        "Mistral",
        dict(num_key_value_heads=1, sliding_window=100, tie_word_embeddings=True, rope_parameters=YARN),
    ),
    "ministral, windows in some layers": (
        "Ministral",
        dict(head_dim=16, sliding_window=16, layer_types=MIXED_LAYERS, tie_word_embeddings=True),
    ),
    "qwen2 yarn": ("Qwen2", dict(rope_parameters=YARN)),
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
    "glm": ("Glm", dict(head_dim=8, attention_bias=True)),
    "glm, one key head, no biases": (
        "Glm",
        dict(head_dim=12, num_key_value_heads=1, attention_bias=False, tie_word_embeddings=True),
    ),
    "glm4": ("Glm4", dict(head_dim=8, attention_bias=True)),
    "glm4 yarn, tied": (
        "Glm4",
        dict(
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters=YARN | dict(partial_rotary_factor=0.25),
        ),
    ),
    "qwen2 moe": (
        "Qwen2Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
        ),
    ),
    "qwen2 moe, no biases, normalised": (
        "Qwen2Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=32,
            norm_topk_prob=True,
            qkv_bias=False,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        dict(head_dim=8, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "qwen3 moe, plain weights": (
        "Qwen3Moe",
        dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False),
    ),
}


def as_transformers_4_writes(values: dict) -> dict:
    """`rope_parameters` as the settings it was before transformers 5."""
    rope = dict(values["rope_parameters"])
    older = {key: value for key, value in values.items() if key != "rope_parameters"}
    older["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    older["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return older


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    from safetensors.torch import load_file

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
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-5, rtol=1e-5)

    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config_from_hf(as_transformers_4_writes(said)) == ours.config

    written = config_to_hf(ours.config)  # and what we write is the same model again, for them and for us
    assert config_from_hf(written) == ours.config
    again = getattr(transformers, f"{family}Config")(**written)
    same = "layer_types sliding_window use_sliding_window num_key_value_heads rope_parameters num_experts".split()
    assert written["model_type"] == config.model_type
    assert {key: getattr(again, key, None) for key in same} == {key: getattr(config, key, None) for key in same}

    state = hf_tensors(ours.config, ours.state_dict())
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(state[key], tensor) for key, tensor in saved.items())
    assert set(state) - set(saved) <= {"lm_head.weight"}


@pytest.mark.parametrize(
    "rope",
    [
        dict(YARN, mscale=1.3, mscale_all_dim=0.7),  # DeepSeek's temperature, in two parts
        dict(YARN, mscale=1.3),  # one alone is ignored
        dict(YARN, mscale=1.3, mscale_all_dim=0.7, attention_factor=0.8),
        dict(rope_type="dynamic", factor=2.5, rope_theta=1e4),  # as none, up to max_position_embeddings
    ],
)
def test_ropes_that_are_written_in_another_way(rope, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | dict(rope_parameters=rope))).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    theirs.save_pretrained(tmp_path)
    ours = load_weights(tmp_path).build()
    tokens = torch.randint(1, TINY["vocab_size"], (2, TINY["max_position_embeddings"]))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    assert config_from_hf(config_to_hf(ours.config)) == ours.config


@pytest.mark.parametrize(
    "family, changes, ours",
    [
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
                rope_parameters=YARN | dict(partial_rotary_factor=0.25),
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
    ids=("glm4 moe", "glm4 moe yarn", "mellum"),
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


@pytest.mark.parametrize("family", ("Qwen2", "Qwen3", "Mistral", "Glm", "Glm4", "Qwen2Moe", "Qwen3Moe"))
def test_every_default_of_a_family_is_that_of_transformers(family):
    """A config.json that says nothing but sizes."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=9, hidden_size=64, num_hidden_layers=2, num_attention_heads=32)
    sizes |= dict(intermediate_size=8, max_position_embeddings=64)
    theirs = getattr(transformers, f"{family}Config")(**sizes)
    ours = config_from_hf(sizes | dict(model_type=theirs.model_type))
    names = "num_key_value_heads rms_norm_eps tie_word_embeddings num_experts_per_tok moe_intermediate_size".split()
    names += ["norm_topk_prob", "shared_expert_intermediate_size"]
    if family not in ("Qwen2", "Qwen2Moe", "Mistral"):  # theirs is worked out in the model
        names.append("head_dim")
    for name in names:
        if (value := getattr(theirs, name, None)) is not None and (ours.num_experts or "moe" not in name):
            assert getattr(ours, name) == value, name
    assert ours.sliding_window == (4096 if family == "Mistral" else None)


def test_yarn_reaches_factor_times_the_trained_length():
    """Qwen2.5's files state the trained length, and users add the scaling. The limit stayed as it was."""
    values = dict(model_type="qwen2", vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    values |= dict(num_key_value_heads=1, max_position_embeddings=32768, rope_scaling=dict(type="yarn", factor=4.0))
    for stated in ({}, dict(original_max_position_embeddings=32768)):
        values["rope_scaling"] |= stated
        config = config_from_hf(values)
        assert config.max_position_embeddings == 131072
        assert config.rope_scaling == dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(model_type="mamba"), "model_type 'mamba' is not supported, only llama, mistral, qwen2"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(model_type="qwen2_moe", num_key_value_heads=1, use_sliding_window=True), "use_sliding_window=True"),
        (dict(model_type="qwen2_moe", num_key_value_heads=1, mlp_only_layers=[0]), r"mlp_only_layers=\[0\]"),
        (dict(model_type="qwen2_moe", num_key_value_heads=1, decoder_sparse_step=2), "decoder_sparse_step=2"),
        (dict(mlp_bias=True), "mlp_bias=True"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(use_sliding_window=True), "use_sliding_window=True"),
        (dict(quantization_config=dict(quant_method="gptq", bits=4)), "weights quantised by gptq"),
        (dict(rope_scaling=dict(type="longrope", factor=2.0)), "rope_scaling kind 'longrope' is not one of linear"),
        (dict(rope_scaling=dict(type="yarn")), "rope_scaling of kind yarn lacks factor"),
        (dict(rope_scaling=dict(rope_type="linear", factor=4.0, mscale=0.7)), "RoPE scaling not supported: mscale=0.7"),
    ],
)
def test_what_would_change_the_mathematics_is_refused_by_name(changes, named):
    values = dict(model_type="llama", vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    values |= dict(max_position_embeddings=64)
    config_from_hf(values)
    with pytest.raises(UserError, match=named):
        config_from_hf(values | changes)


def test_a_mixture_that_no_family_computes_is_not_written():
    for changes in (dict(num_shared_experts=1), dict(qk_norm=False)):
        config = ModelConfig(**dict(num_experts=4, qk_norm=True) | changes)
        with pytest.raises(UserError, match="transformers has no family for this model"):
            config_to_hf(config)


def test_a_tensor_that_nobody_reads_is_named_and_an_old_buffer_is_not_missed(tmp_path):
    """Llama 2's directories hold RoPE's frequencies, which follow from config.json."""
    from safetensors.torch import save_file

    model = CausalLM(ModelConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model.config)), encoding="utf-8")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, tmp_path / "model.safetensors")
    load_weights(tmp_path).build()
    save_file(state | {"model.layers.0.self_attn.o_proj.bias": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"o_proj\.bias"):
        load_weights(tmp_path).build()


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
