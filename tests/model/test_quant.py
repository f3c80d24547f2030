"""Packed weights against arithmetic by hand, against bitsandbytes to the last bit, and what they must not cost."""

import runpy
import warnings
import weakref

import pytest
import torch
from torch import nn

from common.console import UserError
from model.config import ModelConfig
from model.layers import Head, Linear
from model.lora import (
    Adapter,
    LoRALinear,
    LoRASettings,
    QuantLoRALinear,
    adapted,
    add_lora,
    freeze,
    merge,
    remove_lora,
    unmerge,
)
from model.packed import (
    NF4,
    NF4_CODE,
    Int8,
    _nearest,
    _nearest_nf4,
    dequantize,
    dequantize_int8,
    quantize,
    quantize_int8,
    quantize_nf4,
)
from model.precision import lower_frozen
from model.quant import QuantLinear, bytes_per_parameter, quantize_model, quantized, unpack_model
from model.transformer import CausalLM
from tests.helpers.models import TINY_TOKENS as TOKENS
from tests.helpers.models import tiny_model

SHAPES = [(64, 128), (3, 64), (7, 30), (5, 13), (1, 1), (200, 333)]  # the last four are no multiple of a block
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- by hand


def test_nf4_by_hand():
    """One block whose largest value is 2: its weights are looked up as multiples of 2.

    w/2:   -1      0      1      0.5                             0.01
    code:  0       7      15     12 (0.4407; the next is 0.5626) 7 (0; the next is 0.0796)

    Half of 0.4407 + 0.5626 is 0.50166: at 0.5 the lower one is nearer. Two codes a byte: 0x07, 0xFC, then 7 and the
    padding's 7. The scales 2 have mean 2; what remains of the only one is 0, entry 127 of the dynamic code."""
    packed = quantize_nf4(torch.tensor([[-2.0, 0.0, 2.0, 1.0, 0.02]]))
    assert packed.codes.tolist() == [0x07, 0xFC, 0x77]
    assert packed.scale_codes.tolist() == [127]
    assert packed.block_scales.tolist() == [0.0] and packed.scale_mean.item() == 2.0
    expected = torch.tensor([[-2.0, 0.0, 2.0, 2 * NF4_CODE[12], 0.0]])
    assert torch.equal(dequantize(packed, (1, 5), torch.float32), expected)


def test_the_scales_are_quantised_too():
    """Two blocks with scales 1 and 3: the mean is 2, and what remains is -1 and 1, of which the larger is 1. The
    dynamic code has 1 (entry 255) but no -1: its lowest is -0.99296875, the middle of the lowest 64th of [-1, -0.1]."""
    weight = torch.stack([torch.full((64,), 1.0), torch.full((64,), 3.0)])
    packed = quantize_nf4(weight)
    assert packed.scale_mean.item() == 2.0 and packed.block_scales.tolist() == [1.0]
    assert packed.scale_codes.tolist() == [0, 255]
    rows = dequantize(packed, (2, 64), torch.float32)
    assert rows[1].unique().tolist() == [3.0]
    assert rows[0].unique().item() == pytest.approx(2 - 0.99296875)


def test_int8_by_hand():
    """Row 0 has the largest value 1.27, so a step is 0.01; row 1 is zeros, and its scale 0 is not divided by."""
    packed = quantize_int8(torch.tensor([[1.27, -1.27, 0.304], [0.0, 0.0, 0.0]]))
    assert packed.codes.tolist() == [[127, -127, 30], [0, 0, 0]]
    assert packed.scales.tolist() == pytest.approx([1.27, 0.0])
    weight = dequantize_int8(packed, torch.float32)
    assert weight[0].tolist() == pytest.approx([1.27, -1.27, 0.30]) and weight[1].tolist() == [0.0] * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_within_half_a_step(shape):
    """Of two neighbours of NF4 the widest apart are -1 and -0.696; so no weight is off by more than 0.152 of its
    block's scale, apart from what the scale's own rounding adds (below 1 % of a scale's spread)."""
    weight = random(*shape)
    error = (dequantize(quantize_nf4(weight), shape, torch.float32) - weight).abs().max()
    assert error <= 0.17 * weight.abs().max()
    packed = quantize_int8(weight)
    error = (dequantize_int8(packed, torch.float32) - weight).abs()
    assert (error <= packed.scales[:, None] / 127 * 0.5001).all()


def test_the_table_of_cells_finds_the_nearest_code():
    """At the borders between two codes, a few floats to either side, and at the edges of the cells."""
    borders = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
    edges = torch.arange(-32, 33) / 32
    x = [torch.cat([borders, edges, random(4000).clamp(-1, 1)])]
    for towards in (-2.0, 2.0):
        near = x[0]
        for _ in range(3):
            x.append(near := torch.nextafter(near, torch.tensor(towards)))
    x = torch.cat(x)[None]
    assert torch.equal(_nearest_nf4(x, torch.ones(1, 1)), _nearest(x, torch.ones(1, 1), NF4_CODE))


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_nothing_is_divided_by_zero(value):
    """The inverse of a scale 0 is infinite, and so is that of the smallest numbers."""
    for shape in SHAPES:
        weight = torch.full(shape, value)
        for result in (
            dequantize(quantize_nf4(weight), shape, torch.float32),
            dequantize_int8(quantize_int8(weight), torch.float32),
        ):
            assert (result.abs() <= value).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_what_is_not_finite_is_refused(quantize, bad):
    """A code has no entry for NaN: it would silently become a number."""
    weight = random(8, 64)
    weight[5, 3] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        quantize(weight)


def test_pieces_make_no_difference(monkeypatch):
    """On CPUs, a large layer is converted piece by piece."""
    weight = random(40, 200)
    whole = quantize_nf4(weight), quantize_int8(weight)
    monkeypatch.setattr("model.packed.PIECE", 256)
    for packed, pieces in zip(whole, (quantize_nf4(weight), quantize_int8(weight))):
        assert all(torch.equal(a, b) for a, b in zip(packed, pieces))
    small = dequantize(whole[0], (40, 200), torch.bfloat16), dequantize_int8(whole[1], torch.bfloat16)
    monkeypatch.undo()
    assert torch.equal(small[0], dequantize(whole[0], (40, 200), torch.bfloat16))
    assert torch.equal(small[1], dequantize_int8(whole[1], torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same():
    weight = random(200, 333)
    here, there = quantize_nf4(weight), quantize_nf4(weight.cuda())
    assert torch.equal(here.codes, there.codes.cpu())
    same = NF4(*(tensor.cuda() for tensor in here))  # a mean may be summed in another order there
    for dtype in DTYPES:
        assert torch.equal(dequantize(here, weight.shape, dtype), dequantize(same, weight.shape, dtype).cpu())
    here, there = quantize_int8(weight), quantize_int8(weight.cuda())
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(dequantize_int8(here, torch.bfloat16), dequantize_int8(there, torch.bfloat16).cpu())


# ---- against bitsandbytes


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(scope="module")
def reference_kernels(bitsandbytes):
    """bitsandbytes' kernels in PyTorch by name. They round as its CUDA kernels do. Its compiled CPU library does so in
    all but one: it looks 8-bit codes up in a table of 65,536 cells, and is off by one near a cell that a border
    crosses."""
    kernels = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        record = lambda name, backend: lambda kernel: kernels.setdefault(name.partition("::")[2], kernel)
        patch.setattr("bitsandbytes._ops.register_kernel", record)
        warnings.simplefilter("ignore", RuntimeWarning)  # it has been imported before; here it is run once more
        runpy.run_module("bitsandbytes.backends.default.ops")
    return kernels


def nf4_of(packed, state) -> NF4:
    return NF4(packed.view(-1), state.absmax, state.state2.absmax, state.offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 1024)])
def test_nf4_is_bitsandbytes(bitsandbytes, reference_kernels, shape, dtype):
    weight = random(*shape, dtype=dtype)
    weight[0] *= 50  # blocks of different sizes
    ours = quantize_nf4(weight)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = nf4_of(packed, state)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scale_mean, theirs.scale_mean)
    assert torch.equal(ours.block_scales, theirs.block_scales)

    once, unnested = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    code = bitsandbytes.create_dynamic_map()
    codes, _ = reference_kernels["quantize_blockwise"](unnested.absmax - theirs.scale_mean, code, 256)
    assert torch.equal(ours.scale_codes, codes)
    off = (ours.scale_codes.int() - theirs.scale_codes.int()).abs()  # of the compiled CPU library
    # where a block of scales is all 0, that library writes code 0 instead of the code of 0, and scales it by 0
    off = off[theirs.block_scales.repeat_interleave(256)[: len(off)] > 0]
    assert (off <= 1).all() and off.sum() <= 0.01 * len(off)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 1024)])
def test_dequantised_nf4_is_bitsandbytes(bitsandbytes, shape, dtype):
    weight = random(*shape, dtype=dtype)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = bitsandbytes.dequantize_4bit(packed, state)
    assert theirs.dtype == dtype
    assert torch.equal(dequantize(nf4_of(packed, state), shape, dtype), theirs)


def test_every_byte_and_every_scale_code_is_bitsandbytes(bitsandbytes):
    """All 256 bytes of two codes, under all 256 codes of a scale."""
    packed, state = bitsandbytes.quantize_4bit(
        random(256, 512), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    packed = torch.arange(256, dtype=torch.uint8).repeat(256).view(packed.shape)
    state.absmax = torch.arange(256, dtype=torch.uint8).repeat_interleave(8)
    theirs = bitsandbytes.dequantize_4bit(packed, state)
    assert torch.equal(dequantize(nf4_of(packed, state), (256, 512), torch.float32), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_bitsandbytes(bitsandbytes, reference_kernels, shape, dtype):
    weight = random(*shape, dtype=dtype)
    ours = quantize_int8(weight)
    codes, scales, _ = reference_kernels["int8_vectorwise_quant"](weight)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.scales, scales)
    assert torch.equal(dequantize_int8(ours, torch.float32), bitsandbytes.int8_vectorwise_dequant(codes, scales))


# ---- the layer


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_layer_is_the_linear_of_its_dequantised_weight(bits, dtype):
    linear = Linear(30, 17)
    layer = QuantLinear.from_linear(linear, bits)
    dense = Linear(30, 17)
    dense.weight.data, dense.bias = layer.dequantize(), linear.bias
    assert (dense.weight - linear.weight).abs().max() > 0, "a weight that was not rounded shows nothing"

    results = []
    for module in (layer, dense):
        linear.bias.grad = None
        x = random(2, 5, 30, dtype=dtype, seed=1).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad, linear.bias.grad))
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_dense_is_kept_for_the_backward_pass(bits):
    layer = QuantLinear.from_linear(Linear(256, 128, bias=False), bits)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(random(3, 256).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {buffer.data_ptr() for buffer in layer.buffers()}


@pytest.mark.parametrize("bits", [4, 8])
def test_there_and_back_through_safetensors(bits, tmp_path):
    from safetensors.torch import load_file, save_file

    layer = QuantLinear.from_linear(Linear(30, 17), bits)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    with torch.device("meta"):
        again = QuantLinear.from_linear(Linear(30, 17), bits)
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    x = random(3, 30)
    assert torch.equal(again(x), layer(x))
    fields = {4: NF4, 8: Int8}[bits]._fields
    assert set(layer.state_dict()) == {*fields, "bias"}


def test_loading_the_other_format_is_an_error():
    four, eight = (QuantLinear.from_linear(Linear(64, 8), bits) for bits in (4, 8))
    with pytest.raises(RuntimeError, match="scale_mean"):
        four.load_state_dict(eight.state_dict())
    with pytest.raises(UserError, match="3 bits"):
        QuantLinear(64, 8, bits=3)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_stay_fp32_when_the_model_is_cast(bits):
    """DeepSpeed calls model.bfloat16(): 8 bits of mantissa in a scale would move every weight of its block."""
    layer = QuantLinear.from_linear(Linear(64, 32), bits)
    before = layer.dequantize()
    layer.bfloat16()
    assert torch.equal(layer.dequantize(), before)
    assert layer.bias.dtype == torch.bfloat16
    lower_frozen(layer.requires_grad_(False), torch.float16)
    assert torch.equal(layer.dequantize(), before) and layer.bias.dtype == torch.float16


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_on_meta_is_filled_by_a_dense_weight(bits):
    weight = random(17, 30)
    layer = QuantLinear(30, 17, bits, device="meta")
    assert layer(torch.empty(4, 30, device="meta", dtype=torch.bfloat16)).shape == (4, 17)
    sizes = {name: (buffer.shape, buffer.dtype) for name, buffer in layer.named_buffers()}
    layer.quantize_(weight)
    assert {name: (buffer.shape, buffer.dtype) for name, buffer in layer.named_buffers()} == sizes
    linear = Linear(30, 17, bias=False)
    linear.weight.data = weight
    assert torch.equal(layer.dequantize(), QuantLinear.from_linear(linear, bits).dequantize())
    with pytest.raises(ValueError, match="a weight"):
        layer.quantize_(weight.T)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_learns_beside_a_packed_weight(bits):
    """The same output and gradients as beside the dequantised weight, to rounding: the bias is added at another
    place."""
    base = QuantLinear.from_linear(Linear(30, 17), bits)
    dense = Linear(30, 17)
    dense.weight.data, dense.bias = base.dequantize(), base.bias
    layers = QuantLoRALinear(base), LoRALinear(dense)
    torch.manual_seed(0)
    adapter = Adapter(dense, LoRASettings(rank=4))
    nn.init.normal_(adapter.B)
    results = []
    for layer in layers:
        freeze(layer)
        layer.adapters["default"], layer.active = adapter.requires_grad_(), "default"
        adapter.zero_grad()
        x = random(2, 5, 30).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, adapter.A.grad.clone(), adapter.B.grad.clone()))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    assert {name for name, _ in layers[0].named_parameters()} == {"bias", "adapters.default.A", "adapters.default.B"}


@pytest.mark.parametrize("bits", [4, 8])
def test_merging_beside_packed_weights_dequantises_and_adds(bits):
    """W' = dequantised W + scale B A, rounded to bf16 once. The packed weight stays, so unmerging gives its bits."""
    model = tiny_model()
    freeze(model)
    quantize_model(model, bits)
    add_lora(model, LoRASettings(rank=4))
    for layer in adapted(model).values():
        nn.init.normal_(layer.adapter("default").B, std=0.3)
    layer = model.model.layers[1].mlp.down_proj
    assert type(layer) is QuantLoRALinear
    expected = (layer.dequantize() + layer.adapter("default").product()).bfloat16()
    before, size = model(TOKENS).logits, model.num_parameters()
    merge(model)
    merge(model)  # twice is once
    assert torch.equal(layer.weight, expected) and not torch.equal(layer.weight, layer.dequantize().bfloat16())
    merged = model(TOKENS).logits
    torch.testing.assert_close(merged, before, atol=0.1, rtol=0.05)
    unmerge(model)
    assert torch.equal(model(TOKENS).logits, before) and model.num_parameters() == size
    merge(model)
    remove_lora(model)
    assert type(model.model.layers[1].mlp.down_proj) is Linear and not quantized(model)
    assert torch.equal(model(TOKENS).logits, merged)

    plain = tiny_model()
    quantize_model(plain, bits)
    again = tiny_model()
    quantize_model(again, bits)
    add_lora(again, LoRASettings(rank=4))
    remove_lora(again)
    assert type(again.model.layers[1].mlp.down_proj) is QuantLinear
    assert torch.equal(again(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_tensors_hold_no_other_memory(shape, bits):
    """A view would keep what fills up the last block, and be saved with it; moving or loading one tensor must not write
    into another."""
    packed = quantize(random(*shape), bits)
    assert [tensor.untyped_storage().nbytes() for tensor in packed] == [tensor.nbytes for tensor in packed]
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed}) == len(packed)


# ---- the model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_quantised_in_place(bits):
    model = tiny_model(tie_word_embeddings=True)
    dense = tiny_model(tie_word_embeddings=True)
    names = quantize_model(model, bits)
    assert list(quantized(model)) == names and len(names) == 2 * 7
    assert type(model.lm_head) is Head and model.lm_head.weight is model.model.embed_tokens.weight
    for name, layer in quantized(model).items():
        dense.get_submodule(name).weight.data = layer.dequantize()
    assert torch.equal(model(TOKENS).logits, dense(TOKENS).logits)
    assert quantize_model(model, bits) == [], "twice is once"


@pytest.mark.parametrize("shared", ["shared_experts.0", "shared_expert"])
def test_routers_and_experts_stay_dense(shared):
    """Qwen2-MoE's shared expert has a router of its own."""
    more = dict(shared_expert_intermediate_size=16) if shared == "shared_expert" else dict(num_shared_experts=1)
    model = tiny_model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **more)
    names = quantize_model(model, 4)
    assert {name.split(".", 3)[3] for name in names} == {
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{shared}.{x}_proj" for x in ("gate", "up", "down")),
    }
    routers = {name: module for name, module in model.named_modules() if name.endswith("gate")}
    assert len(routers) == (4 if shared == "shared_expert" else 2)
    assert {type(module) for module in routers.values()} == {torch.nn.Linear}
    assert model(TOKENS).logits.isfinite().all()


def test_a_head_of_its_own_stays_dense_too():
    model = tiny_model(tie_word_embeddings=False)
    assert "lm_head" not in quantize_model(model, 8) and type(model.lm_head) is Head


def test_dense_weights_are_freed_one_by_one(monkeypatch):
    """Memory never holds more than one dense layer above what is left to do and what is done."""
    model = tiny_model()
    alive = weakref.WeakSet(
        module.weight for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"
    )
    counts = []
    original = QuantLinear.from_linear.__func__

    def counted(cls, linear, bits):
        counts.append(len(alive))
        return original(cls, linear, bits)

    monkeypatch.setattr(QuantLinear, "from_linear", classmethod(counted))
    quantize_model(model, 4)
    assert counts == list(range(14, 0, -1))


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_it_computes_the_same(bits):
    model = tiny_model(attention_bias=True).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    quantize_model(model, bits)
    expected = model(TOKENS).logits
    unpack_model(model, torch.float32)
    assert not quantized(model) and {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert torch.equal(model(TOKENS).logits, expected) and not any(m.training for m in model.modules())


def test_a_damaged_layer_is_named():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        quantize_model(model, 4)


def test_adapters_come_after():
    model = tiny_model()
    model.set_submodule("model.layers.0.self_attn.q_proj", LoRALinear(model.model.layers[0].self_attn.q_proj))
    with pytest.raises(ValueError, match="quantise first"):
        quantize_model(model, 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_recomputing_blocks_changes_no_gradient(bits):
    """Checkpointing lets a backward pass unpack what it saved only once."""
    model = tiny_model()
    freeze(model)
    quantize_model(model, bits)
    grads = []
    for model.recompute in (False, True):
        weight = model.model.embed_tokens.weight.requires_grad_()
        weight.grad = None
        model(TOKENS, targets=TOKENS.roll(-1, 1)).loss.sum().backward()
        grads.append(weight.grad)
    assert grads[0].abs().sum() > 0 and torch.equal(*grads)


@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_is_the_same(bits):
    """Through the autograd part of the compiler in one graph; its code generator is left out, which needs a C++
    compiler and half a minute."""
    layer = QuantLinear.from_linear(Linear(30, 17), bits)
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x = random(5, 30).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)


def test_bytes_of_a_parameter_by_arithmetic():
    """Llama 2 7B on `meta`, its frozen weights in bf16.

    each block            4 matrices 4096 x 4096 and 3 of 4096 x 11008 = 202,375,168 weights, of 32 blocks
    4 bits                1/2 + 1/64 + 4/(64*256) bytes a weight and 4 a matrix (the mean); all sizes divide evenly
    8 bits                1 byte a weight and 4 a row: 4*4096 + 2*11008 + 4096 rows a block
    dense, 2 bytes each   embedding and head 32000 x 4096 each, 65 norms of 4096; the norms stay in fp32, 4 bytes
    """
    shape = dict(vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    shape |= dict(num_key_value_heads=32, intermediate_size=11008, tie_word_embeddings=False)
    packed, embedded, norms = 32 * 202_375_168, 2 * 32000 * 4096, 65 * 4096
    packed_bytes = {
        4: packed * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 4 * 7 * 32,
        8: packed + 4 * 32 * (4 * 4096 + 2 * 11008 + 4096),
    }
    for bits, limit in ((4, 0.6), (8, 1.05)):
        with torch.device("meta"):
            model = CausalLM(ModelConfig(**shape))
        assert packed + embedded + norms == model.num_parameters() == 6_738_415_616
        freeze(model)
        lower_frozen(model, torch.bfloat16)
        quantize_model(model, bits)
        frequencies = model.rope_frequencies.nbytes
        total = packed_bytes[bits] + 2 * embedded + 4 * norms + frequencies
        assert bytes_per_parameter(model) == pytest.approx(total / 6_738_415_616, rel=1e-12)
        assert bytes_per_parameter(model) <= limit  # 0.574 and 1.040
