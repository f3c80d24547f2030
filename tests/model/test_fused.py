"""On GPUs, packed weights of large models go through compiled code: here through the CPU's, with the same results."""

import pytest
import torch
from torch._inductor import metrics

from model import fused as file
from model import quant
from model.fused import Fused
from model.packed import _unpack_nf4, dequantize, mv, quantize
from model.precision import prepare_for_inference
from model.quant import QuantLinear, quantize_model
from tests.helpers.models import TINY_TOKENS, tiny_model


@pytest.mark.parametrize("bits", (4, 8))
def test_compiled_unpacking_gives_the_same_bits(bits):
    """One graph for all shapes whose blocks are whole; 151 x 200 is 471 blocks and a part of one."""
    unpack = file.fused.__wrapped__  # a compiler of its own
    for shape in ((64, 128), (512, 192), (151, 200)):
        packed = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), bits)
        found = dequantize(packed, shape, torch.bfloat16, unpack)
        assert torch.equal(found, dequantize(packed, shape, torch.bfloat16))


@pytest.mark.parametrize("bits", (4, 8))
def test_one_position_is_multiplied_by_the_codes(bits):
    """80 x 320 has 400 blocks of 64: they have two scales of scales, of which the second is for 144."""
    product = file.fused.__wrapped__(mv)
    for shape in ((512, 192), (64, 128), (80, 320)):
        generator = torch.Generator().manual_seed(0)
        packed, x = quantize(torch.randn(shape, generator=generator), bits), torch.randn(shape[1], generator=generator)
        right = dequantize(packed, shape, torch.float32) @ x
        for multiply in (product, mv):  # compiled, and as it is without a compiler
            torch.testing.assert_close(multiply(packed, x), right, rtol=1e-4, atol=1e-4)
            half = multiply(packed, x.bfloat16())
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.float(), right, rtol=0.02, atol=0.2)


def test_the_product_of_4_bits_is_one_kernel():
    """The weight itself would be a second one."""
    torch._dynamo.reset()  # forgets the graphs of the test above
    metrics.reset()
    file.fused.__wrapped__(mv)(quantize(torch.randn(512, 192), 4), torch.randn(192))
    assert metrics.generated_kernel_count == 1


@torch.inference_mode()
def test_large_models_take_it_while_a_gpu_generates(monkeypatch):
    calls = []
    monkeypatch.setattr(quant, "fused", lambda function: calls.append(function) or function)
    for large in (False, True):
        model = tiny_model(hidden_size=64, intermediate_size=96)
        quantize_model(model, 4)
        monkeypatch.setattr("model.precision.LARGE", model.num_parameters() + (not large))
        prepare_for_inference(model, torch.float32)
        exact, alone = model(TINY_TOKENS).logits, model(TINY_TOKENS[:1, :1]).logits
        assert not calls, "a CPU unpacks piece by piece"
        with monkeypatch.context() as patch:
            patch.setattr(quant, "may_compile", lambda _: True)
            assert torch.equal(model(TINY_TOKENS).logits, exact)
            many, calls = calls, []
            torch.testing.assert_close(model(TINY_TOKENS[:1, :1]).logits, alone)
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        odd = sum(layer.in_features % 64 > 0 for layer in layers)  # 96: a block crosses from one row into the next
        assert 0 < odd < len(layers)
        assert many == [_unpack_nf4] * len(layers) * large
        assert sorted(calls, key=id) == sorted([mv] * (len(layers) - odd) + [_unpack_nf4] * odd, key=id) * large


def test_without_a_compiler_it_goes_on_with_one_warning(monkeypatch, capsys):
    def missing(*_):
        raise RuntimeError("Cannot find a working triton installation\nmore about it")

    monkeypatch.setattr(torch, "compile", lambda function, **_: missing)
    double = Fused(lambda x: 2 * x)
    assert double(3) == double(3) == 6
    assert capsys.readouterr().err.splitlines() == [
        "warning: packed weights are unpacked without the compiler, so generation is slower: Cannot find a working "
        "triton installation"
    ]
