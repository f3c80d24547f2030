"""The loss of the head in chunks: the losses and gradients of the plain one, from a fraction of the logits."""

import pytest
import torch
import torch.nn.functional as F

from model import transformer
from model.head import _CompiledCrossEntropy, _CrossEntropy, loss_in_chunks
from model.lora import LoRASettings, add_lora, freeze
from tests.helpers.compare import assert_same_gradients
from tests.helpers.models import TINY_TOKENS, tiny_model

TARGETS = TINY_TOKENS.roll(-1, 1).clone()
TARGETS[:, ::3] = -100
SOME = dict(targets=TARGETS, selected=torch.tensor([*(TARGETS.flatten() >= 0).nonzero().flatten(), 0, 0]))


def gradients(model, monkeypatch, chunks: bool, dtype=torch.float32, **arguments):
    """-> losses and gradients of a sum in which each target has another weight, as DPO's have."""
    monkeypatch.setattr(transformer, "LOGITS_AT_ONCE", 1 if chunks else 1 << 26)
    monkeypatch.setattr(transformer, "positions_at_once", lambda numbers: 7)
    model.zero_grad()
    model.compute_dtype = dtype
    losses = model(TINY_TOKENS, **arguments).loss
    (losses * torch.linspace(0.5, 2, losses.numel()).view_as(losses)).sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arguments", (dict(targets=TARGETS), SOME), ids=("all", "selected"))
@pytest.mark.parametrize("tied", (True, False))
def test_chunks_change_nothing(arguments, tied, monkeypatch):
    model = tiny_model(tie_word_embeddings=tied)
    losses, expected = gradients(model, monkeypatch, False, **arguments)
    found, of_chunks = gradients(model, monkeypatch, True, **arguments)
    torch.testing.assert_close(found, losses)
    assert_same_gradients(of_chunks, expected, 1e-5)
    assert "model.embed_tokens.weight" in expected and ("lm_head.weight" in expected) != tied


def test_in_bf16_the_sum_of_chunks_is_as_close_to_fp32(monkeypatch):
    """A plain product sums in fp32 and is rounded once. Chunks are rounded one by one, and added up in fp32."""
    model = tiny_model()
    _, exact = gradients(model, monkeypatch, False, targets=TARGETS)
    name = "model.embed_tokens.weight"
    plain, chunked = (gradients(model, monkeypatch, c, torch.bfloat16, targets=TARGETS)[1][name] for c in (False, True))
    assert chunked.dtype == torch.float32
    far = [(found - exact[name]).norm() / exact[name].norm() for found in (plain, chunked)]
    assert far[1] < 1.2 * far[0] < 0.05


def test_a_frozen_head_gets_no_gradient(monkeypatch):
    """With LoRA the head's weight is as large as ever, but only what flows through it is needed."""
    model = tiny_model()
    freeze(model)
    add_lora(model, LoRASettings(rank=2))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    losses, expected = gradients(model, monkeypatch, False, targets=TARGETS)
    found, of_chunks = gradients(model, monkeypatch, True, targets=TARGETS)
    torch.testing.assert_close(found, losses)
    assert expected and all(".adapters." in name for name in expected)
    assert_same_gradients(of_chunks, expected, 1e-5)


@pytest.mark.parametrize("frozen", (False, True))
def test_a_criterion_may_return_several_numbers(frozen):
    """Of each position the loss and something beside it, each with a gradient of its own."""
    torch.manual_seed(0)
    x, weight = torch.randn(10, 6, requires_grad=True), torch.randn(9, 6, requires_grad=not frozen)
    targets = torch.randint(9, (10,))
    trained = (x,) if frozen else (x, weight)

    def both(logits, rows):
        return torch.stack([F.cross_entropy(logits, targets[rows], reduction="none"), logits.logsumexp(1)], 1)

    def gradients(found):
        return torch.autograd.grad((found * torch.tensor([2.0, 0.3])).sum(), trained)

    torch.testing.assert_close(
        gradients(loss_in_chunks(x, weight, both, 4)), gradients(both(x @ weight.T, slice(None)))
    )


def test_no_more_logits_than_a_chunk(monkeypatch):
    """40 positions, 7 at a time, again in the backward pass; and the forward pass keeps none of them. `V` is the only
    size of 67."""
    model, sizes, kept = tiny_model(), [], []
    cross_entropy = model.cross_entropy
    model.cross_entropy = lambda logits, targets: sizes.append(len(logits)) or cross_entropy(logits, targets)
    wide = lambda x: kept.append(x) if x.shape[-1:] == (67,) else None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: wide(x) or x, lambda x: x):
        gradients(model, monkeypatch, True, targets=TARGETS)
    assert sizes == 2 * [7, 7, 7, 7, 7, 5]
    assert all(len(tensor) <= 7 for tensor in kept)


def test_a_frozen_head_makes_its_logits_once(monkeypatch):
    """With LoRA the gradient of the head's input comes with the loss, and is all that is kept: 40 positions of 24."""
    model, sizes = tiny_model(), []
    freeze(model)
    cross_entropy = model.cross_entropy
    model.cross_entropy = lambda logits, targets: sizes.append(len(logits)) or cross_entropy(logits, targets)
    monkeypatch.setattr(transformer, "positions_at_once", lambda numbers: 16)
    x = torch.randn(40, 24, requires_grad=True)
    losses = model._losses(x, TARGETS.flatten(), None)
    assert [tensor.shape for tensor in losses.grad_fn.saved_tensors] == [(1, 40, 24)]
    model.cross_entropy = None  # not called again
    (losses * torch.arange(40.0)).sum().backward()
    assert sizes == [14, 14, 12], "chunks of about the same length"
    expected = F.cross_entropy(model.lm_head(x), TARGETS.flatten(), reduction="none")
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("function", (_CrossEntropy, _CompiledCrossEntropy))
def test_the_gradient_is_made_with_the_loss(function, dtype, monkeypatch):
    """What torch computes in fp32, gradients rounded once; where there is no target both are 0. At one position the
    target is almost certain: 1 minus its probability is far below the precision of bf16."""
    monkeypatch.setattr("model.head.PIECE", 3 * 67)
    logits = (5 * torch.randn(40, 67, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[1, TARGETS.flatten()[1]] = 24.0
    logits.requires_grad_()
    weights = torch.linspace(0.5, 2, 40)
    expected = F.cross_entropy(logits.float(), TARGETS.flatten(), reduction="none")
    found = function.apply(logits, TARGETS.flatten())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (expected,), (found,) = (torch.autograd.grad((loss * weights).sum(), logits) for loss in (expected, found))
    assert found.dtype == dtype and not found[TARGETS.flatten() < 0].any()
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_few_logits_are_made_at_once(monkeypatch):
    """Chunks cost a product more, so what fits is computed as before: no chunk below 2^27 logits."""
    monkeypatch.setattr("model.layers.loss_in_chunks", lambda *_: pytest.fail("a chunk"))
    tiny_model()(TINY_TOKENS, targets=TARGETS)
    assert 32 * 512 * 6400 < 2 * transformer.LOGITS_AT_ONCE < 4 * 2048 * 151_936
    assert transformer.positions_at_once(151_936) == 441
