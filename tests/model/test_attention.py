"""Documents packed into one row behave as if each stood alone: in every kernel, forward and backward."""

import pytest
import torch

from model.attention import AttentionMask, build_mask, causal_attention
from model.config import ModelConfig
from model.rope import count_positions
from model.transformer import CausalLM

KERNELS = ("sdpa", "blocked")
CONFIG = ModelConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LENGTHS = (5, 1, 9, 8)  # of the documents packed into a row of 23


def build(kernel: str, **changes) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**{**CONFIG.to_dict(), **changes}))
    for parameter in model.parameters():  # zero-initialised projections would make every block the identity
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.attention_kernel = kernel
    return model


def packed_row() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[n for n, length in enumerate(LENGTHS, 1) for _ in range(length)]])
    return tokens, documents


def reference(q, k, v, documents=None):
    """Attention as the formula has it, one head and one query at a time."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [s for s in range(t + 1) if documents is None or documents[b, s] == documents[b, t]]
                scores = k[b, h // group, seen] @ q[b, h, t] / q.shape[-1] ** 0.5
                out[b, h, t] = scores.softmax(0) @ v[b, h // group, seen]
    return out


@pytest.mark.parametrize("T", (1, 3, 8, 13))
@pytest.mark.parametrize("packed", (False, True))
def test_kernels_equal_the_formula(T, packed):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 6, dtype=torch.float64) for heads in (4, 2, 2))
    documents = torch.randint(1, 4, (2, T)).sort(1).values if packed else None
    expected = reference(q, k, v, documents)
    for kernel in KERNELS:
        mask = build_mask(T, torch.arange(T)[None], documents, q, kernel)
        out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_logits_equal_unpacked_ones(kernel):
    model = build(kernel)
    tokens, documents = packed_row()
    packed = model(tokens, documents=documents).logits[0].split(LENGTHS)
    for alone, logits in zip(tokens[0].split(LENGTHS), packed):
        torch.testing.assert_close(logits, model(alone[None]).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_leaks_into_another_document(kernel):
    """Change every token of one document: the others must not move, nor must their gradients reach it."""
    model = build(kernel)
    tokens, documents = packed_row()
    other = tokens.clone()
    other[documents == 3] = (other[documents == 3] + 1) % 61
    before, after = (model(x, documents=documents).logits[0] for x in (tokens, other))
    moved = (before != after).any(-1)
    assert torch.equal(moved, documents[0] == 3)

    x = model.model.embed_tokens(tokens).detach().requires_grad_()
    model.model.embed_tokens.forward = lambda _: x
    loss = model(tokens, targets=tokens, documents=documents).loss
    loss[documents == 2].sum().backward()
    touched = (x.grad[0] != 0).any(-1)
    assert torch.equal(touched, documents[0] == 2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_future_is_not_seen(kernel):
    model = build(kernel)
    tokens = torch.randint(61, (1, 16))
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % 61
    moved = (model(tokens).logits != model(other).logits).any(-1)[0]
    assert moved.tolist() == [False] * 9 + [True] * 7


def test_kernels_give_the_same_gradients():
    tokens, documents = packed_row()
    gradients = []
    for kernel in KERNELS:
        model = build(kernel)
        model(tokens, targets=tokens.roll(-1, 1), documents=documents).loss.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_head_only_where_it_is_needed():
    """`selected` names two trained positions and fills up with an untrained one: the same losses, zero elsewhere."""
    model = build("sdpa")
    tokens = torch.randint(61, (2, 6))
    targets = torch.full((2, 6), -100)
    targets[0, 4], targets[1, 1] = 7, 9  # flat positions 4 and 7
    whole = model(tokens, targets=targets).loss
    assert whole.nonzero().tolist() == [[0, 4], [1, 1]]
    part = model(tokens, targets=targets, selected=torch.tensor([4, 7, 0, 0])).loss
    torch.testing.assert_close(part, whole)
    expected = -model(tokens).logits.log_softmax(-1)[0, 4, 7]
    torch.testing.assert_close(whole[0, 4], expected)


def test_positions_restart():
    assert count_positions(torch.tensor([[1, 1, 2, 3, 3, 3], [0, 4, 4, 4, 0, 0]])).tolist() == [
        [0, 1, 0, 0, 1, 2],
        [0, 0, 1, 2, 0, 1],
    ]


def test_plain_causal_needs_no_mask():
    build = lambda T, S: build_mask(T, torch.arange(S)[None], None, torch.zeros(1), "sdpa")
    assert build(8, 8) == AttentionMask("sdpa")
    assert build(1, 9) == AttentionMask("sdpa")
    late = build(2, 5).tensor  # two new queries after three cached keys
    assert late[0, 0].tolist() == [[True, True, True, True, False], [True, True, True, True, True]]
