"""ChatGLM3's checkpoints against its published definition (THUDM/chatglm3-6b, modeling_chatglm.py), written again here
one position and one head at a time."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from common.console import UserError
from model.adapter import load_adapter
from model.checkpoint import load_weights
from model.interop.hf import config_from_hf, config_to_hf, hf_tensors
from model.lora import find_targets
from model.quant import quantize_model
from tests.helpers.chatglm import CONFIG, write_chatglm


def reference(values: dict, state: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) of one text."""
    H, K, D = values["num_attention_heads"], values["multi_query_group_num"], values["kv_channels"]
    half = D // 2  # of each head is rotated, in pairs of neighbours
    base = 10000 * values.get("rope_ratio", 1)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + values["layernorm_epsilon"]).sqrt() * state[f"{name}.weight"]

    def rotate(head, position):
        out = head.clone()
        for i in range(0, half, 2):
            angle = position / base ** (i / half)
            a, b = head[i], head[i + 1]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = state["transformer.embedding.word_embeddings.weight"][tokens]
    for i in range(values["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        name = f"{layer}.self_attention.query_key_value"
        mixed = norm(x, f"{layer}.input_layernorm") @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        q, k, v = mixed.split([H * D, K * D, K * D], dim=-1)
        rows = []
        for t in range(len(tokens)):
            heads = []
            for h in range(H):
                group = slice((h // (H // K)) * D, (h // (H // K) + 1) * D)
                query = rotate(q[t, h * D : (h + 1) * D], t)
                scores = torch.stack([query @ rotate(k[s, group], s) for s in range(t + 1)]) / math.sqrt(D)
                heads.append(scores.softmax(0) @ v[: t + 1, group])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ state[f"{layer}.self_attention.dense.weight"].T
        wide = norm(x, f"{layer}.post_attention_layernorm") @ state[f"{layer}.mlp.dense_h_to_4h.weight"].T
        gate, up = wide.chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * up) @ state[f"{layer}.mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm") @ state["transformer.output_layer.weight"].T


def test_a_tied_head_is_read_as_one():
    assert config_from_hf(CONFIG | dict(tie_word_embeddings=True)).tie_word_embeddings


@pytest.mark.parametrize("changes", ({}, dict(multi_query_group_num=1, rope_ratio=50), dict(multi_query_group_num=4)))
def test_logits_equal_the_published_definition(tmp_path, changes):
    values = CONFIG | changes
    state = write_chatglm(tmp_path, **changes)
    tokens = [5, 60, 7, 7, 0, 33, 12, 1, 2, 40, 41]
    with torch.no_grad():
        logits = load_weights(tmp_path).build()(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits, reference(values, state, tokens), atol=1e-5, rtol=1e-5)


def test_it_is_written_as_glm(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_chatglm(tmp_path)
    checkpoint = load_weights(tmp_path)
    written = config_to_hf(checkpoint.config)
    assert written["model_type"] == "glm"
    theirs = transformers.GlmForCausalLM(transformers.GlmConfig(**written, pad_token_id=0)).eval()
    theirs.load_state_dict(hf_tensors(checkpoint.config, checkpoint.state))
    tokens = torch.randint(61, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.build()(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_fused_layers_are_packed_one_by_one(tmp_path):
    """Blocks of 64 weights do not run on from q into k, which lies behind it in query_key_value."""
    write_chatglm(tmp_path)
    model, tokens = load_weights(tmp_path).build(), torch.arange(20)[None]
    quantize_model(model, 4)
    with torch.no_grad():
        assert torch.equal(load_weights(tmp_path).build(bits=4)(tokens).logits, model(tokens).logits)


def test_lora_targets_have_its_names(tmp_path):
    write_chatglm(tmp_path)
    model = load_weights(tmp_path).build()
    found = find_targets(model, ("query_key_value", "dense_4h_to_h"))
    assert [name.rpartition(".")[2] for name in found] == ["q_proj", "k_proj", "v_proj", "down_proj"] * 2
    glm4 = find_targets(model, ("gate_up_proj",))  # what GLM-4 calls the same as dense_h_to_4h
    assert glm4 == find_targets(model, ("dense_h_to_4h",)) and len(glm4) == 4


def test_pefts_adapters_for_its_own_layout_are_read(tmp_path):
    """As its users have them: W + alpha/r B A on its fused layers, under its names."""
    state = write_chatglm(tmp_path / "base")
    torch.manual_seed(1)
    merged, matrices = dict(state), {}
    for name in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
        for i in range(CONFIG["num_layers"]):
            layer = f"transformer.encoder.layers.{i}.{name}"
            rows, columns = state[f"{layer}.weight"].shape
            A, B = torch.randn(3, columns) * 0.2, torch.randn(rows, 3) * 0.2
            merged[f"{layer}.weight"] = state[f"{layer}.weight"] + 7 / 3 * B @ A
            matrices |= {f"base_model.model.{layer}.lora_A.weight": A, f"base_model.model.{layer}.lora_B.weight": B}
    (tmp_path / "lora").mkdir()
    save_file(matrices, tmp_path / "lora" / "adapter_model.safetensors")
    values = dict(peft_type="LORA", r=3, lora_alpha=7, target_modules=["query_key_value"])
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    tokens = [5, 60, 7, 7, 0, 33]
    with torch.no_grad():
        model = load_adapter(tmp_path / "lora").apply(load_weights(tmp_path / "base").build())
        torch.testing.assert_close(
            model(torch.tensor([tokens])).logits[0], reference(CONFIG, merged, tokens), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(multi_query_attention=False), "multi_query_attention=False"),
        (dict(rmsnorm=False), "rmsnorm=False"),
        (dict(post_layer_norm=False), "post_layer_norm=False"),
        (dict(add_bias_linear=True), "add_bias_linear=True"),
        (dict(pre_seq_len=128), "pre_seq_len=128"),
        (dict(quantization_bit=4), "quantization_bit=4"),
        (dict(apply_residual_connection_post_layernorm=True), "apply_residual_connection_post_layernorm=True"),
    ],
)
def test_what_would_change_the_mathematics_is_refused_by_name(changes, named):
    assert config_from_hf(CONFIG | dict(pre_seq_len=None, quantization_bit=0)).rotary_fraction == 0.5
    with pytest.raises(UserError, match=named):
        config_from_hf(CONFIG | changes)


def test_chatglm_1_and_broken_files_are_refused(tmp_path):
    first = dict(model_type="chatglm", position_encoding_2d=True, hidden_size=48, num_layers=2)
    with pytest.raises(UserError, match="position_encoding_2d=True, multi_query_attention=None"):
        config_from_hf(first)
    with pytest.raises(UserError, match="kv_channels missing"):
        config_from_hf({key: value for key, value in CONFIG.items() if key != "kv_channels"})
    state = write_chatglm(tmp_path)
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    save_file(state | {name: state[name][1:].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\..*: has 63 rows, but config.json says 32 \+ 16 \+ 16"):
        load_weights(tmp_path)
    save_file(state | {"transformer.prefix_encoder.embedding.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="prefix_encoder"):
        load_weights(tmp_path).build()
