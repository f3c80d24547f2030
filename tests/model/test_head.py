"""The loss of the head in chunks: the losses and gradients of the plain one, from a fraction of the logits."""

import pytest
import torch
import torch.nn.functional as F

from model import transformer
from model.head import loss_in_chunks
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


def test_a_criterion_may_return_several_numbers():
    """Of each position the loss and something beside it, each with a gradient of its own."""
    torch.manual_seed(0)
    x, weight = torch.randn(10, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    targets = torch.randint(9, (10,))

    def both(logits, rows):
        return torch.stack([F.cross_entropy(logits, targets[rows], reduction="none"), logits.logsumexp(1)], 1)

    (both(x @ weight.T, slice(None)) * torch.tensor([2.0, 0.3])).sum().backward()
    expected = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    (loss_in_chunks(x, weight, both, 4) * torch.tensor([2.0, 0.3])).sum().backward()
    torch.testing.assert_close((x.grad, weight.grad), expected)


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


def test_few_logits_are_made_at_once(monkeypatch):
    """Chunks cost a product more, so what fits is computed as before: no chunk below 2^27 logits."""
    monkeypatch.setattr(transformer, "loss_in_chunks", lambda *_: pytest.fail("a chunk"))
    tiny_model()(TINY_TOKENS, targets=TARGETS)
    assert 32 * 512 * 6400 < 2 * transformer.LOGITS_AT_ONCE < 4 * 2048 * 151_936
    assert transformer.positions_at_once(151_936) == 441
