"""Generation with a cache says what the full forward pass says, however the prompt is cut, padded or batched."""

import pytest
import torch

from inference.cache import KVCache
from inference.decode import decode, generate, pad_left, prefill
from inference.drawn import Drawn
from inference.sampling import Sampling
from model.config import ModelConfig
from model.transformer import CausalLM
from tests.helpers.models import random_model

CONFIG = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


KINDS = {
    "dense": {},
    "moe": dict(num_experts=4),
    "window": dict(sliding_window=4),
    "window in some layers, half of each head rotated": dict(
        sliding_window=6,
        layer_types=("full_attention", "sliding_attention", "sliding_attention"),
        rope_local_theta=20.0,
        rotary_fraction=0.5,
    ),
}


@pytest.fixture(params=KINDS)
def model(request):
    return random_model(ModelConfig(**{**CONFIG.to_dict(), **KINDS[request.param]}), std=0.2, seed=1).eval()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 12], [19, 1]])
def test_cached_logits_equal_the_full_pass(model, chunks):
    """MiniMind's chunked prefill was wrong by 1.77: is_causal aligns to the top left when there are more keys than
    queries."""
    tokens = torch.randint(97, (2, 20))
    expected = model(tokens).logits
    cache = KVCache(CONFIG, rows=2, capacity=20, dtype=torch.float32)
    parts = [model(part, cache=cache).logits for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_on_the_left_is_never_seen(model):
    prompts = [[5, 6, 7], [9], list(range(20, 31))]
    tokens, documents = pad_left(prompts, "cpu")
    cache = KVCache(CONFIG, rows=3, capacity=16, dtype=torch.float32)
    together = prefill(model, tokens, documents, cache)
    more = torch.tensor([[1, 2], [3, 4], [5, 6]])  # then decode two more tokens per row
    after = model(more, cache=cache).logits
    for row, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt + more[row].tolist()])).logits[0]
        torch.testing.assert_close(together[row], alone[len(prompt) - 1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(after[row], alone[-2:], atol=1e-5, rtol=1e-4)


def test_greedy_batch_equals_single_rows_and_the_loop_without_cache(model):
    prompts = [[5, 6, 7], [9], list(range(20, 31))]
    greedy = Sampling(temperature=0)
    batch = generate(model, prompts, greedy, max_new_tokens=12)
    for prompt, reply in zip(prompts, batch):
        assert generate(model, [prompt], greedy, max_new_tokens=12) == [reply]
        text = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert text[len(prompt) :] == reply


def test_a_stop_token_ends_its_row_only(model):
    prompts = [[5, 6, 7], [9]]
    free = generate(model, prompts, Sampling(temperature=0), max_new_tokens=10)
    stop = {free[0][4]}
    ended = generate(model, prompts, Sampling(temperature=0), max_new_tokens=10, stop=stop)
    cut = lambda row: row[: next((i for i, t in enumerate(row) if t in stop), len(row))]
    assert ended == [cut(free[0]), cut(free[1])] and len(ended[0]) <= 4


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_rows_that_have_ended_are_not_computed_any_more(model, penalty):
    """A batch goes on until its longest answer ends. Rows that said a word had cost as much as that one until then."""
    greedy = Sampling(temperature=0, repetition_penalty=penalty)
    prompts = [[n, n + 1, n + 2][: 1 + n % 3] for n in range(5, 13)]
    alone = [generate(model, [prompt], greedy, max_new_tokens=16)[0] for prompt in prompts]
    stop = {reply[1] for reply in alone[:6]} - set(alone[6])  # ends most rows soon, and one never
    cut = lambda row: row[: next((i for i, t in enumerate(row) if t in stop), len(row))]
    sizes, forward = [], model.forward
    model.forward = lambda tokens, **options: sizes.append(len(tokens)) or forward(tokens, **options)
    together = generate(model, prompts, greedy, max_new_tokens=16, stop=stop)
    if penalty == 1:  # a stop token is never penalised, so with a penalty the texts are others
        assert together == [cut(row) for row in alone]
    assert together == [generate(model, [p], greedy, max_new_tokens=16, stop=stop)[0] for p in prompts]
    assert sizes[0] == 8 and sizes[len(together[6]) - 1] <= 4


def test_the_repetition_penalty_leaves_end_tokens_alone(model):
    """Every turn of a chat ends with one, so the prompt is full of them: penalised, the model did not stop."""
    prompts = torch.cartesian_prod(torch.arange(97), torch.arange(97))
    with torch.no_grad():
        likeliest = model(prompts).logits[:, -1].argmax(-1)
    prompt = prompts[likeliest == prompts[:, 0]][0].tolist()  # one that goes on with what it began with
    strong = Sampling(temperature=0, repetition_penalty=1e6)
    assert generate(model, [prompt], strong, max_new_tokens=1, stop={prompt[0], 5000}) == [[]]
    assert generate(model, [prompt], strong, max_new_tokens=1)[0] not in ([prompt[0]], [prompt[1]])


def test_a_conversation_continues_from_its_cache(model):
    first, rest = [5, 6, 7, 8], [11, 12, 13]
    cache = KVCache(CONFIG, 1, 40, torch.float32)
    reply = [t for (t,) in decode(model, [first], Sampling(temperature=0), max_new_tokens=5, cache=cache)]
    history = first + reply + rest
    cache.length = min(cache.length, len(first) + len(reply))  # the last token drawn was never fed
    assert cache.length == len(first) + len(reply) - 1
    continued = [t for (t,) in decode(model, [history], Sampling(temperature=0), max_new_tokens=5, cache=cache)]
    assert [continued] == generate(model, [history], Sampling(temperature=0), max_new_tokens=5)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(temperature=1.2, seed=3), Sampling(temperature=0, repetition_penalty=2)],
)
def test_tokens_that_are_read_late_are_the_same(model, sampling):
    """Rows end after 0 to 12 tokens, so that some are computed too far and others are left out."""
    prompts = [[n, n + 1, n + 2][: 1 + n % 3] for n in range(8)]
    free = generate(model, prompts, sampling, max_new_tokens=12, late=False)
    stop = {free[n][n] for n in range(3)}  # one for each of the first rows
    for most in (1, 2, 12):
        steps = [
            list(decode(model, prompts, sampling, max_new_tokens=most, stop=stop, late=late)) for late in (False, True)
        ]
        assert steps[0] == steps[1] and (most < 12 or any(None in ids for ids in steps[0]))


def test_the_next_step_is_queued_before_a_token_is_read(model, monkeypatch):
    happened = []
    monkeypatch.setattr(Drawn, "read", lambda self: happened.append("read") or ([7], [None]))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **more: happened.append("compute") or forward(*args, **more))
    steps = decode(model, [[5]], Sampling(temperature=0), max_new_tokens=3, late=True)
    assert [*steps] == [[7]] * 3
    assert happened == ["compute", "compute", "read", "compute", "read", "read"]


def test_the_same_seed_says_the_same(model):
    runs = [generate(model, [[5, 6]], Sampling(temperature=1.5, seed=s), max_new_tokens=20) for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_the_penalty_counts_the_prompt_and_what_was_said(model):
    """So large a penalty that nothing is said twice, neither of the prompt nor of the reply itself."""
    once = Sampling(temperature=0, repetition_penalty=1e9)
    (free,) = generate(model, [[5, 6, 7]], Sampling(temperature=0), max_new_tokens=1)
    prompts = [[5, *free], [9]]  # without the penalty, more of the same would follow
    for prompt, reply in zip(prompts, generate(model, prompts, once, max_new_tokens=40)):
        assert len(set(reply)) == 40 and not set(reply) & set(prompt)


def test_the_last_position_is_used():
    model = CausalLM(ModelConfig(**{**CONFIG.to_dict(), "max_position_embeddings": 8})).eval()
    (reply,) = generate(model, [[1, 2, 3]], Sampling(temperature=0), max_new_tokens=5)
    assert len(reply) == 5
    with pytest.raises(ValueError, match="a prompt of 3 tokens and 6 new ones exceed the model's 8 positions"):
        generate(model, [[1, 2, 3]], Sampling(temperature=0), max_new_tokens=6)


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="exceed the model's 32768 positions"):
        generate(model, [[1] * 10], Sampling(), max_new_tokens=40_000)
