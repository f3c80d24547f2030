"""Documents packed into one row behave as if each stood alone: in every kernel, forward and backward."""

import math

import pytest
import torch

from inference.slots import Decoding, Slots
from model import attention
from model.attention import AttentionMask, Segments, build_mask, causal_attention, find_segments
from model.config import ModelConfig
from model.rope import apply_rope, as_matrix, count_positions, inverse_frequencies, of_each_number, rope_table
from model.transformer import CausalLM
from tests.helpers.models import random_model
from tests.helpers.varlen import flash_forward, varlen_attn

KERNELS = ("sdpa", "varlen", "apart", "blocked")
CONFIG = ModelConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MIXED = dict(  # a window in two of three layers, with frequencies of their own, and half of each head rotated
    num_hidden_layers=3,
    sliding_window=3,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    rotary_fraction=0.5,
    rope_theta=1e4,
    rope_local_theta=20.0,
)
LENGTHS = (5, 1, 9, 8)  # of the documents packed into a row of 23


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The kernel of `varlen` runs on CUDA only; everything around it is ours."""
    monkeypatch.setattr(attention, "VARLEN", varlen_attn)
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 2)  # so that short rows have several blocks


def build(kernel: str, **changes) -> CausalLM:
    model = random_model(ModelConfig(**{**CONFIG.to_dict(), **changes}), std=0.2)
    model.attention_kernel = kernel
    return model


def packed_row() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[n for n, length in enumerate(LENGTHS, 1) for _ in range(length)]])
    return tokens, documents


def reference(q, k, v, documents=None, window=None):
    """Attention as the formula has it, one head and one query at a time. window: keys seen, itself included."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                near = range(0 if window is None else max(t + 1 - window, 0), t + 1)
                seen = [s for s in near if documents is None or documents[b, s] == documents[b, t]]
                scores = k[b, h // group, seen] @ q[b, h, t] / q.shape[-1] ** 0.5
                out[b, h, t] = scores.softmax(0) @ v[b, h // group, seen]
    return out


@pytest.mark.parametrize("T", (1, 3, 8, 13))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("window", (None, 1, 3, 20))
def test_kernels_equal_the_formula(T, packed, window):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 6, dtype=torch.float64) for heads in (4, 2, 2))
    documents = torch.randint(1, 4, (2, T)).sort(1).values if packed else None
    expected = reference(q, k, v, documents, window)
    for kernel in KERNELS:
        mask = build_mask(torch.arange(T)[None], documents, q, kernel, window=window)
        out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        torch.testing.assert_close(out, expected)


def test_a_single_query_on_a_gpu_equals_the_formula():
    q, k, v = (torch.randn(1, heads, T, 6, dtype=torch.float64) for heads, T in ((4, 1), (2, 9), (2, 9)))
    last = torch.cat((torch.zeros(1, 4, 8, 6, dtype=torch.float64), q), dim=2)
    for window, mask in ((None, None), (3, torch.tensor([-math.inf] * 6 + [0.0] * 3, dtype=torch.float64))):
        expected = reference(last, k, v, None, window)[:, :, 8:]
        torch.testing.assert_close(attention.alone(q, k, v, None if mask is None else mask.view(1, 1, 1, 9)), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("changes", ({}, MIXED), ids=("plain", "windows"))
def test_packed_logits_equal_unpacked_ones(kernel, changes):
    model = build(kernel, **changes)
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


@pytest.mark.parametrize("changes", ({}, MIXED), ids=("plain", "windows"))
def test_kernels_give_the_same_gradients(changes):
    tokens, documents = packed_row()
    gradients = []
    for kernel in KERNELS:
        model = build(kernel, **changes)
        model(tokens, targets=tokens.roll(-1, 1), documents=documents).loss.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for others in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(others[name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


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
    assert build_mask(torch.arange(8)[None], None, torch.zeros(1), "sdpa") == AttentionMask("sdpa")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("changes", ({}, MIXED), ids=("plain", "windows"))
def test_two_answers_share_a_prompt(kernel, changes):
    """The second answer stands six places behind the prompt that it continues. A window has to count positions, not
    places in the row, or it would not see the prompt at all."""
    model = build(kernel, **changes)
    prompt, first, second = torch.randint(61, (1, 15), generator=torch.Generator().manual_seed(1)).split((5, 6, 4), 1)
    together = model(
        torch.cat((prompt, first, second), 1),
        documents=torch.tensor([[1] * 5 + [2] * 6 + [3] * 4]),
        prefixes=torch.ones(1, 15, dtype=torch.long),
        positions=torch.tensor([[*range(5), *range(5, 11), *range(5, 9)]]),
    ).logits
    alone = model(torch.cat((prompt, second), 1)).logits
    torch.testing.assert_close(together[:, 11:], alone[:, 5:], atol=1e-5, rtol=1e-4)
    alone = model(torch.cat((prompt, first), 1)).logits
    torch.testing.assert_close(together[:, :11], alone, atol=1e-5, rtol=1e-4)


def test_a_token_is_felt_as_far_as_the_windows_reach():
    """Three layers with a window of 3: each carries a token 2 places on, so token 4 reaches places 4 to 4 + 3 x 2."""
    model = build("sdpa", num_hidden_layers=3, sliding_window=3)
    tokens = torch.randint(61, (1, 16))
    other = tokens.clone()
    other[0, 4] = (other[0, 4] + 1) % 61
    moved = (model(tokens).logits != model(other).logits).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9, 10]


def test_where_is_causal_leaks_the_mask_is_spelled_out(monkeypatch):
    """Apple's GPUs in half precision: nothing warns, and the model learns from what it should predict."""
    model, tokens = build("sdpa"), torch.randint(61, (1, 9))
    expected = model(tokens).logits
    monkeypatch.setattr(attention, "is_causal_works", lambda device: device.type == "cuda")
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    note = lambda *heads, is_causal, attn_mask, **more: (
        seen.append((is_causal, attn_mask is None)) or sdpa(*heads, is_causal=is_causal, attn_mask=attn_mask, **more)
    )
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    torch.testing.assert_close(model(tokens).logits, expected)
    assert set(seen) == {(False, False)}


def test_a_mask_is_built_once_for_each_window(monkeypatch):
    built = []
    counted = lambda *arguments: built.append(arguments[-2]) or build_mask(*arguments)
    monkeypatch.setattr("model.transformer.build_mask", counted)
    build("sdpa")(torch.randint(61, (1, 9)))
    assert built == [None]
    built.clear()
    build("sdpa", **MIXED)(torch.randint(61, (1, 9)))
    assert sorted(built, key=str) == [3, None]


def test_the_mask_is_kept_once_and_not_in_every_layer():
    """sdpa turned a mask of booleans into one of numbers in each layer, and kept them all for the backward pass: 4 GB
    for 16 layers, 32 rows of 2,048."""
    model, (tokens, documents) = build("sdpa", num_hidden_layers=4), packed_row()
    T, places = tokens.shape[1], []
    note = lambda tensor: places.append(tensor.data_ptr()) if tensor.shape[-2:] == (T, T) else None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: note(x) or x, lambda x: x):
        model(tokens, targets=tokens, documents=documents)
    assert len(places) >= 4 and len(set(places)) == 1


def test_the_rows_of_a_mask_begin_where_a_gpu_reads_them():
    """torch's memory-efficient kernel wants strides of 8 numbers, and copies other masks in every layer. MiniMind's
    usual row length is 340 = 42 * 8 + 4."""
    seen = torch.ones(3, 1, 340, 340, dtype=torch.bool).tril()
    mask = attention.additive(seen, torch.float16)
    assert mask.shape == seen.shape and mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert torch.equal(mask == 0, seen) and torch.equal(mask.isneginf(), ~seen)


def test_a_rope_table_is_made_once_for_each_theta(monkeypatch):
    """Of a head's 8 numbers MIXED rotates R = 4, so the second frequency is theta ** (-2 / 4)."""
    made = []
    counted = lambda positions, freq, *more, **named: made.append(freq) or rope_table(positions, freq, *more, **named)
    monkeypatch.setattr("model.transformer.rope_table", counted)
    build("sdpa")(torch.randint(61, (1, 9)))
    assert len(made) == 1
    made.clear()
    build("sdpa", **MIXED)(torch.randint(61, (1, 9)))
    assert [freq[-1].item() ** -2 for freq in made] == pytest.approx([1e4, 20.0])


def test_a_window_that_holds_the_whole_text_needs_no_mask():
    build = lambda window: build_mask(torch.arange(8)[None], None, torch.zeros(1), "sdpa", window=window)
    assert build(8) == AttentionMask("sdpa")
    assert build(7).tensor[0, 0, 7].tolist() == [-math.inf] + [0] * 7


def test_what_is_not_rotated_passes_through():
    """A head of 8 with half of it rotated: at position 1 the pairs are (0, 2), turned by 1, and (1, 3), turned by 0.01
    (base 10,000, 4 numbers: frequencies 1 and 10,000^(-2/4))."""
    config = ModelConfig(
        hidden_size=8, num_attention_heads=1, num_key_value_heads=1, rope_theta=1e4, rotary_fraction=0.5
    )
    x = torch.arange(1.0, 9.0)
    y = apply_rope(x.view(1, 1, 1, 8), rope_table(torch.tensor([[1]]), of_each_number(inverse_frequencies(config)[0])))
    c, s = math.cos(1), math.sin(1)
    slow_c, slow_s = math.cos(0.01), math.sin(0.01)
    rotated = [1 * c - 3 * s, 2 * slow_c - 4 * slow_s, 3 * c + 1 * s, 4 * slow_c + 2 * slow_s]
    torch.testing.assert_close(y.flatten(), torch.tensor([*rotated, 5, 6, 7, 8]))


def test_interleaved_pairs_are_neighbours():
    """The same numbers in GLM's layout: at position 1 the pairs (1, 2) and (3, 4) are turned by 1 and by 0.01."""
    config = ModelConfig(hidden_size=4, num_attention_heads=1, num_key_value_heads=1, rope_theta=1e4)
    table = rope_table(torch.tensor([[1]]), of_each_number(inverse_frequencies(config)[0], interleaved=True))
    y = apply_rope(torch.arange(1.0, 5.0).view(1, 1, 1, 4), table, interleaved=True)
    c, s = math.cos(1), math.sin(1)
    slow_c, slow_s = math.cos(0.01), math.sin(0.01)
    rotated = [1 * c - 2 * s, 2 * c + 1 * s, 3 * slow_c - 4 * slow_s, 4 * slow_c + 3 * slow_s]
    torch.testing.assert_close(y.flatten(), torch.tensor(rotated))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_matrix_turns_as_cos_and_sin_do(interleaved, fraction):
    """On GPUs, for single tokens: three rows at different places, of which the second stands at 0 and is not turned."""
    config = ModelConfig(
        hidden_size=32, num_attention_heads=4, rope_theta=1e4, rotary_fraction=fraction, rope_interleaved=interleaved
    )
    each = of_each_number(inverse_frequencies(config)[0], interleaved)
    x, rope = torch.randn(3, 1, 4, 8), rope_table(torch.tensor([[5], [0], [700]]), each)
    turned = apply_rope(x, as_matrix(rope, config))
    torch.testing.assert_close(turned, apply_rope(x, rope, interleaved))
    assert torch.equal(turned[1], x[1]) and not torch.allclose(turned[2], x[2])


@pytest.mark.parametrize("window", [None, 3])
def test_single_queries_see_the_keys_that_are_there(window, monkeypatch):
    """Three rows with 5, 1 and 7 keys in a room for 8, of which the rest is NaN: as if each row stood alone."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    q, k, v = torch.randn(3, 1, 4, 6), torch.full((3, 2, 8, 6), math.nan), torch.full((3, 2, 8, 6), math.nan)
    lengths = (5, 1, 7)
    for row, length in enumerate(lengths):
        k[row, :, :length], v[row, :, :length] = torch.randn(2, 2, length, 6)
    used = torch.tensor(lengths, dtype=torch.int32).repeat_interleave(2)  # of both heads
    begins = torch.arange(7, dtype=torch.int32)
    mask = AttentionMask("flash", None, window, Segments(begins, begins * 8), used, most=7)
    found = causal_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)
    for row, length in enumerate(lengths):
        last = torch.zeros(1, 4, length, 6)
        last[:, :, -1] = q[row]  # the reference has a query at every place
        expected = reference(last, k[row : row + 1, :, :length], v[row : row + 1, :, :length], window=window)
        torch.testing.assert_close(found[row, 0], expected[0, :, -1])


# ---- segments


def test_segments_by_hand():
    """Two rows of 4: documents of 1 and 3 tokens, then one of 4. There is room for one in 128 positions, so for 1, and
    it doubles to 4; the rest are empty segments at the end."""
    queries, keys, gather = find_segments(torch.tensor([[1, 2, 2, 2], [1, 1, 1, 1]]))
    assert queries.tolist() == [0, 1, 4, 8, 8] and keys is queries and gather is None


def test_empty_segments_take_no_more_room_than_the_rows():
    """The kernel's backward pass keeps 128 positions for each segment, in fp32. Eleven documents in each row."""
    documents = (torch.arange(2048) // 200).expand(2, -1)
    queries, _, _ = find_segments(documents)
    assert 22 <= len(queries) - 1 <= documents.numel() // 128


def test_a_shared_prompt_stands_before_each_answer():
    """One row: a prompt of 2, answers of 1 and 2, a filling of 1. The prompt has its own keys, each answer those of the
    prompt and its own: 2 + (2 + 1) + (2 + 2) + 1 = 10 keys, filled up to a multiple of half the row."""
    documents, prefixes = torch.tensor([[1, 1, 2, 3, 3, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    queries, keys, gather = find_segments(documents, prefixes)
    assert queries.tolist() == [0, 2, 3, 5, 6] and keys.tolist() == [0, 2, 5, 9, 10]
    assert gather.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 4, 5]


def test_segments_of_two_rows_do_not_mix():
    """The second row's documents have the same numbers, and their own prompt."""
    documents, prefixes = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.ones(2, 3, dtype=torch.int32)
    queries, keys, gather = find_segments(documents, prefixes)
    assert queries.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6] and keys.tolist() == [0, 1, 3, 5, 6, 8, 10, 10, 10]
    assert gather.tolist() == [0, 0, 1, 0, 2, 3, 3, 4, 3, 5, 4, 5]


def test_no_position_is_read_by_all_of_the_filling():
    """A GPU adds up the gradients of one position one after the other, though those of the filling are 0."""
    documents = torch.arange(1, 65).repeat_interleave(8)[None]
    prefixes = documents - (documents - 1) % 3  # a prompt and two answers of 8 each
    _, keys, gather = find_segments(documents, prefixes)
    counts = lambda places: torch.bincount(places, minlength=512).max()
    assert keys[-1] < len(gather) and counts(gather[: keys[-1]]) == 3 and counts(gather[keys[-1] :]) == 1


def test_gradients_with_a_shared_prompt_are_equal():
    """Its keys are there three times, and their gradients are added up; what fills the keys up gets none."""
    documents, prefixes = torch.tensor([[1, 1, 2, 3, 3, 0, 0]] * 2), torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 2)
    positions = torch.tensor([[0, 1, 2, 2, 3, 0, 1]] * 2)
    tokens = torch.arange(14).view(2, 7)
    found = []
    for kernel in ("sdpa", "varlen"):
        model = build(kernel)
        out = model(tokens, targets=tokens.roll(-1, 1), documents=documents, prefixes=prefixes, positions=positions)
        out.loss.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-5, rtol=1e-4)


def test_a_loaders_segments_are_used_as_they_are(monkeypatch):
    """Making them in the model means asking the device where the documents end."""
    model, (tokens, documents) = build("varlen"), packed_row()
    segments = find_segments(documents)
    expected = model(tokens, documents=documents).logits
    monkeypatch.setattr(attention, "find_segments", lambda *_: pytest.fail("made again"))
    assert torch.equal(model(tokens, documents=documents, segments=segments).logits, expected)


def test_which_kernel_is_taken(monkeypatch):
    """Packed rows on a card with flash attention: varlen. Without a mask sdpa has a flash kernel of its own. Too old a
    card, fp32, wide heads, too old a torch, one for Windows: sdpa with a mask."""
    from model.attention import has_flash

    cuda, model = torch.device("cuda", 0), CausalLM(CONFIG)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(attention, "HAS_FLASH", False)
    assert not has_flash(cuda, torch.bfloat16, 64)
    monkeypatch.setattr(attention, "HAS_FLASH", True)
    assert has_flash(cuda, torch.bfloat16, 64) and has_flash(cuda, torch.float16, 128)
    assert not has_flash(cuda, torch.float32, 64) and not has_flash(cuda, torch.bfloat16, 192)
    assert not has_flash(torch.device("cpu"), torch.bfloat16, 64)
    long, short = torch.empty(1, 512, 32), torch.empty(1, 256, 32)
    assert model._kernel(long, masked=True) == "apart" and model._kernel(long, masked=False) == "sdpa"
    assert model._kernel(short, masked=True) == "sdpa" and model._kernel(long.bfloat16(), masked=True) == "blocked"
    x = torch.empty(1, 512, 32, dtype=torch.float16, device="meta")
    monkeypatch.setattr("model.transformer.has_flash", lambda device, dtype, _: dtype == torch.float16)
    assert model._kernel(x, masked=True) == "varlen" and model._kernel(x, masked=False) == "sdpa"
    assert model._kernel(x.float(), masked=True) == "sdpa"
    monkeypatch.setattr("model.transformer.load_varlen", lambda: False)
    assert model._kernel(x, masked=True) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not has_flash(cuda, torch.float16, 64)


def test_documents_apart_in_compiled_code():
    """The operators that the compiler does not look into promise it shapes and strides, and keep them, also where
    nothing needs a gradient. Segments that are empty fill the list of where the documents begin."""
    begins = torch.tensor([0, 5, 6, 15, 23, 23, 23], dtype=torch.int32)
    q, k, v = (torch.randn(23, heads, 8) for heads in (4, 2, 2))
    for grad in (True, False):
        inputs = tuple(t.clone().requires_grad_(grad) for t in (q, k, v))
        torch.library.opcheck(torch.ops.sparrow.attention_apart.default, (*inputs, begins))
    out, log_sum = torch.ops.sparrow.attention_apart(q, k, v, begins)
    torch.library.opcheck(
        torch.ops.sparrow.attention_apart_backward.default, (torch.ones_like(out), q, k, v, out, log_sum, begins)
    )


def test_documents_apart_never_build_a_square():
    """A row of 512 in fp32, as the model takes it: no tensor of T * T numbers is made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
            self.size = max([self.size, *(t.numel() for t in tensors)])
            return out

    model, sizes = CausalLM(CONFIG), []
    tokens, documents = torch.zeros(1, 512, dtype=torch.long), torch.arange(512)[None] // 100
    for kernel in (None, "sdpa"):
        model.attention_kernel = kernel
        with Largest() as seen:
            model(tokens, targets=tokens, documents=documents).loss.sum().backward()
        sizes.append(seen.size)
    assert sizes[0] < 512 * 512 <= sizes[1]


def test_cudnns_attention_is_for_training_without_a_mask(monkeypatch):
    """It plans each new shape for a tenth of a second, and each token that is generated has one. With masks it errs."""
    model, tokens, seen = CausalLM(CONFIG), torch.arange(8)[None], []

    def attend(q, k, v, mask):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return causal_attention(q, k, v, mask)

    on_a_card = lambda _, masks: attention.choose_kernels(torch.device("cuda", 0), masks)
    monkeypatch.setattr("model.transformer.causal_attention", attend)
    monkeypatch.setattr("model.transformer.choose_kernels", on_a_card)
    model(tokens)
    assert seen == [True, True]
    model(tokens, documents=torch.tensor([[1] * 4 + [2] * 4]))
    assert seen == [True, True, False, False]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(tokens)
            model(tokens[:, :3], cache=Decoding(Slots(CONFIG, 1, 8, torch.float32), 1, 3))
    assert seen == [True] * 2 + [False] * 10 and torch.backends.cuda.cudnn_sdp_enabled()
    model.recompute = True
    model(tokens, documents=torch.tensor([[1] * 4 + [2] * 4])).logits.sum().backward()
    assert seen == [True] * 2 + [False] * 14, "recomputed layers choose as they did before"
    model.recompute = False
    monkeypatch.setattr("model.transformer.causal_attention", lambda *_: pytest.fail("in between"))
    with pytest.raises(pytest.fail.Exception), torch.no_grad():
        model(tokens)
    assert torch.backends.cuda.cudnn_sdp_enabled(), "also after an error"


def test_cudnns_attention_is_not_for_segments():
    """From torch 2.15 on, `varlen_attn` prefers it on Hopper and Blackwell where it is not forbidden."""
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    masks = [AttentionMask("sdpa"), AttentionMask("varlen", segments=Segments(bounds, bounds))]
    for given, allowed in ((masks[:1], True), (masks[1:], False), (masks, False)):
        with attention.choose_kernels(torch.device("cuda", 0), given):
            assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
