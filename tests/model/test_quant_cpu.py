"""Weights in int8 and int4 for CPUs: the kernels against plain products with the unpacked weights."""

import pytest
import torch
import torch.nn.functional as F

from common.console import UserError
from model import quant_cpu
from model.config import ModelConfig
from model.layers import Linear
from model.lora import LoRASettings, add_lora, merge
from model.precision import prepare_for_inference
from model.quant import quantize_model
from model.quant_cpu import CPULinear, Int4Linear, Int8Linear, deinterleave, interleave, quantize_for_cpu
from model.transformer import CausalLM


def make_linear(n: int, k: int, bias: bool = False) -> Linear:
    torch.manual_seed(0)
    linear = Linear(k, n, bias=bias)
    torch.nn.init.normal_(linear.weight, std=0.02)
    if bias:
        torch.nn.init.normal_(linear.bias)
    return linear.requires_grad_(False)


def make_model(prepared: bool = True, **settings) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.preset("nano", **dict(num_hidden_layers=2, vocab_size=512) | settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
    return prepare_for_inference(model, torch.float32) if prepared else model


def test_int8_by_hand():
    """scale 0.5 = 63.5 / 127; 63.5 -> 127, -1 -> -2, 0.3 -> 0.6 -> 1, and a row of zeros stays one."""
    packed = Int8Linear.pack(torch.tensor([[63.5, -1.0, 0.3], [0.0, 0.0, 0.0]]))
    assert packed["scales"][0] == 0.5 and packed["codes"].tolist() == [[127, -2, 1], [0, 0, 0]]


def test_int4_by_hand(monkeypatch):
    """One group from -1 to 14: scale 1, zero -1 + 8 = 7. So weight = (code - 8) + 7, and code = weight + 1."""
    weight = torch.arange(32).float().clamp(max=15)[None] - 1
    packed = Int4Linear.pack(weight.expand(64, 32))
    assert (packed["scales_and_zeros"] == torch.tensor([1.0, 7.0])).all()
    codes = deinterleave(packed["codes"], quant_cpu.kernel_block() or 64)  # (K, N)
    assert codes[:, 5].tolist() == [min(i, 15) for i in range(32)]


def test_interleaving_is_undone_and_has_the_order_of_torchs_kernel():
    codes = torch.randint(16, (128, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for block in (32, 64):
        assert torch.equal(deinterleave(interleave(codes, block), block).T, codes)
    if (block := quant_cpu.kernel_block()) is not None:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        assert torch.equal(theirs, interleave(codes, block))


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize(("n", "k"), [(64, 32), (192, 96), (128, 1408)])
def test_kernel_and_dense_product_compute_with_the_unpacked_weight(kind, n, k):
    linear = make_linear(n, k, bias=True)
    layer = kind(linear)
    weight = layer.dequantize()
    # half a step of the codes, and the rounding of bf16 scales
    limit = (
        linear.weight.abs().amax(1, keepdim=True) / 127 if kind is Int8Linear else linear.weight.abs().max() * 2 / 15
    )
    assert ((weight - linear.weight).abs() <= 0.52 * limit + 1e-6).all()
    for rows in (1, 3, 16, 33):  # on both sides of `most_positions`
        x = torch.randn(rows, k).bfloat16()
        exact = x.double() @ weight.double().T + linear.bias.double()
        found = layer(x.view(1, rows, k))[0]
        assert found.dtype == torch.bfloat16 and found.shape == (rows, n)
        assert ((found.double() - exact).abs() <= 0.01 * exact.abs().mean() + 0.02 * exact.abs()).all()
        assert layer(x.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_without_torchs_kernel_the_result_is_the_same(kind):
    linear, x = make_linear(64, 64), torch.randn(2, 64).bfloat16()
    layer = kind(linear)
    assert layer.fast
    found = layer(x)
    layer.fast = False
    torch.testing.assert_close(layer(x), found, rtol=0.02, atol=0.002)


def test_rows_that_are_no_multiple_of_16_keep_away_from_the_kernel():
    """torch 2.13's int8 kernel reads behind the end of such rows: NaN, or a crash of the process."""
    layer = Int8Linear(make_linear(7, 33))
    x = torch.randn(2, 33)
    assert not layer.fast
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize()))


@pytest.mark.parametrize(("kind", "off"), [("int8", 0.05), ("int4", 0.4)])
def test_a_model_computes_nearly_the_same(kind, off):
    model, tokens = make_model(), torch.randint(512, (1, 12))
    parameters = model.num_parameters()
    with torch.inference_mode():
        before = model(tokens).logits
        loss_before = model(tokens, targets=tokens).loss
        said = quantize_for_cpu(model, kind)
        after = model(tokens).logits
        loss = model(tokens, targets=tokens).loss
    assert isinstance(model.lm_head, CPULinear) and isinstance(model.model.layers[0].mlp.gate_up_proj, CPULinear)
    assert (after - before).norm() / before.norm() < off
    assert (loss - loss_before).abs().mean() < off * loss_before.mean()
    assert model.num_parameters() == parameters  # a tied head is not counted twice
    bits = {"int8": 8 + 16 / 200, "int4": 5}[kind]
    assert float(said.split(" bits")[0].rsplit(" ", 1)[1]) == pytest.approx(bits, abs=0.05)


def test_the_loss_in_chunks_equals_that_of_all_logits(monkeypatch):
    """Of a large vocabulary, the logits are made a few positions at a time."""
    model, tokens = make_model(), torch.randint(512, (1, 300))
    quantize_for_cpu(model, "int8")
    with torch.inference_mode():
        whole = model(tokens, targets=tokens).loss
        monkeypatch.setattr("model.transformer.LOGITS_AT_ONCE", 2048)
        torch.testing.assert_close(model(tokens, targets=tokens).loss, whole)


def test_layers_that_int4_does_not_fit_become_int8():
    model = make_model(intermediate_size=200)  # no multiple of 32 or 64
    said = quantize_for_cpu(model, "int4")
    mlp = model.model.layers[0].mlp
    assert [type(layer) for layer in (mlp.gate_up_proj, mlp.down_proj)] == [Int8Linear, Int8Linear]
    assert isinstance(model.model.layers[0].self_attn.o_proj, Int4Linear) and "in int8" in said
    assert torch.isfinite(model(torch.randint(512, (1, 3))).logits).all()


def test_the_router_of_a_mixture_stays():
    model = CausalLM(ModelConfig.preset("moe", hidden_size=64, num_hidden_layers=1, vocab_size=64))
    quantize_for_cpu(prepare_for_inference(model, torch.float32), "int8")
    assert not any(isinstance(module, CPULinear) for name, module in model.named_modules() if name.endswith("gate"))
    assert torch.isfinite(model(torch.randint(64, (1, 3))).logits).all()


def test_what_cannot_be_packed_is_said():
    with torch.device("meta"):
        elsewhere = CausalLM(ModelConfig.preset("nano", num_hidden_layers=1))
    with pytest.raises(UserError, match="for CPUs, and this model is on meta"):
        quantize_for_cpu(elsewhere, "int4")
    low = make_model(prepared=False)
    quantize_model(low, 4)
    with pytest.raises(UserError, match="in 4 bits already"):
        quantize_for_cpu(low, "int8")
    broken = make_model()
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj: the weight holds NaN"):
        quantize_for_cpu(broken, "int8")


def test_an_adapter_has_to_be_merged_and_is_part_of_the_weights_then():
    model = make_model(prepared=False).requires_grad_(False)
    add_lora(model, LoRASettings(rank=2))
    layer = model.model.layers[0].mlp.up_proj
    torch.nn.init.normal_(layer.adapter("default").B)
    with pytest.raises(UserError, match="without adapters; merge them first"):
        quantize_for_cpu(model, "int8")
    merge(model)
    weight = layer.weight.clone()
    quantize_for_cpu(model, "int8")
    packed = model.model.layers[0].mlp.up_proj
    assert ((packed.dequantize() - weight).abs() <= weight.abs().amax(1, keepdim=True) / 200).all()
