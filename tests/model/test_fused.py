"""On GPUs, packed weights of large models are unpacked by compiled code: here by the CPU's, with the same results."""

import pytest
import torch

from model import fused as file
from model import quant
from model.fused import Fused
from model.precision import prepare_for_inference
from model.quant import QuantLinear, dequantize, quantize, quantize_model
from tests.helpers.models import TINY_TOKENS, tiny_model


@pytest.mark.parametrize("bits", (4, 8))
def test_compiled_unpacking_gives_the_same_bits(bits):
    """One graph for all shapes whose blocks are whole; 151 x 200 is 471 blocks and a part of one."""
    unpack = file.fused.__wrapped__  # a compiler of its own
    for shape in ((64, 128), (512, 192), (151, 200)):
        packed = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), bits)
        found = dequantize(packed, shape, torch.bfloat16, unpack)
        assert torch.equal(found, dequantize(packed, shape, torch.bfloat16))


@torch.inference_mode()
def test_large_models_take_it_while_a_gpu_generates(monkeypatch):
    calls = []
    monkeypatch.setattr(quant, "fused", lambda function: calls.append(function) or function)
    for large in (False, True):
        model = tiny_model()
        quantize_model(model, 4)
        monkeypatch.setattr("model.precision.LARGE", model.num_parameters() + (not large))
        prepare_for_inference(model, torch.float32)
        exact = model(TINY_TOKENS).logits
        assert not calls, "a CPU unpacks piece by piece"
        with monkeypatch.context() as patch:
            patch.setattr(quant, "may_compile", lambda _: True)
            assert torch.equal(model(TINY_TOKENS).logits, exact)
        layers = sum(isinstance(module, QuantLinear) for module in model.modules())
        assert len(calls) == (layers if large else 0)


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
