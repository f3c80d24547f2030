"""Guessing tokens ahead changes how long an answer takes, and nothing about what it is."""

import random
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from inference.engine import Engine, Request
from inference.lookup import Lookup
from inference.sampling import Sampling
from inference.session import Session
from model.config import ModelConfig
from tests.helpers.models import random_model

SHAPE = dict(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
WINDOW = dict(sliding_window=6, layer_types=("full_attention", "sliding_attention"))
GREEDY = Sampling(temperature=0)
AHEAD = 6


def model_of(**changes):
    return random_model(ModelConfig(**SHAPE | changes), std=0.2, seed=1).eval()


@pytest.fixture(scope="module")
def model():
    return model_of()


def serve(model, requests: list[Request], ahead: int, rows: int = 4, capacity: int = 100):
    engine = Engine(model, rows, capacity, prompt_lookup_num_tokens=ahead)
    waiting = list(requests)
    sequences = []
    while waiting or engine.busy:  # they come one by one, so that neighbours change
        if waiting:
            sequences.append(engine.submit(waiting.pop(0)))
        engine.step()
    return sequences


def some_requests(sampling: Sampling, count: int = 10, **settings) -> list[Request]:
    """Prompts that repeat themselves, so that there is something to guess."""
    rng = random.Random(0)
    found = []
    for n in range(count):
        piece = [rng.randrange(23) for _ in range(rng.randint(2, 8))]
        own = replace(sampling, seed=n) if sampling.temperature else sampling
        found.append(Request(piece * 3, own, rng.randint(1, 40), **settings))
    return found


def test_guesses_by_hand():
    lookup = Lookup([5, 6, 7, 8, 5, 6])
    assert lookup.guess(3) == [7, 8, 5]
    lookup.extend([9, 1, 5, 6])
    assert lookup.guess(2) == [9, 1]  # the last time counts
    lookup = Lookup([1, 2, 3, 4, 2, 3, 9, 1, 2, 3])
    assert lookup.guess(1) == [4]  # 1, 2, 3 stood there once; 2, 3 alone were followed by 9 later
    assert Lookup([1, 2, 3]).guess(4) == [] and Lookup([7]).guess(4) == [] and Lookup([]).guess(4) == []
    assert Lookup([1, 2, 1, 2]).guess(5) == [1, 2, 1, 2, 1]  # goes on beyond the end of the text
    assert Lookup([4, 4, 4]).guess(3) == [4, 4, 4]


def test_after_wrong_guesses_they_are_shorter():
    lookup = Lookup([5, 6, 7, 8, 5, 6])
    lookup.right = 0
    assert lookup.guess(9) == [7]


@pytest.mark.parametrize("changes", [{}, WINDOW, dict(num_experts=4)], ids=["dense", "window", "moe"])
def test_greedy_answers_are_those_without_guesses(changes):
    model, requests = model_of(**changes), some_requests(GREEDY)
    plain, ahead = serve(model, requests, 0), serve(model, requests, AHEAD)
    assert [s.tokens for s in ahead] == [s.tokens for s in plain]
    assert sum(s.guessed for s in ahead) > 20 and not any(s.guessed for s in plain)


def test_fewer_steps_are_taken(model):
    engines = [Engine(model, 1, 100, prompt_lookup_num_tokens=ahead) for ahead in (0, AHEAD)]
    request = some_requests(GREEDY)[0]
    for engine in engines:
        engine.submit(replace(request, max_new_tokens=40))
        while engine.busy:
            engine.step()
    assert engines[1].steps < engines[0].steps / 2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.3),
        Sampling(temperature=1.0, top_p=0.9, top_k=9),
        Sampling(temperature=0.4, repetition_penalty=1.02, presence_penalty=0.1, frequency_penalty=0.02),
        Sampling(temperature=0, frequency_penalty=0.05, logit_bias={5: 1.0}),
    ],
)
def test_seeded_answers_are_those_without_guesses(model, sampling):
    """Each token gets the random numbers, and the penalties, that it would get without guesses."""
    requests = some_requests(sampling, stop=frozenset({3}), logprobs=2)
    plain, ahead = serve(model, requests, 0), serve(model, requests, AHEAD)
    for one, other in zip(plain, ahead):
        assert (one.tokens, one.end, one.finish_reason) == (other.tokens, other.end, other.finish_reason)
        assert len(one.logprobs) == len(other.logprobs)
        for a, b in zip(one.logprobs, other.logprobs):
            assert a.value == pytest.approx(b.value, abs=1e-4)
            assert [token for token, _ in a.likeliest] == [token for token, _ in b.likeliest]
    assert sum(s.guessed for s in ahead) > 0


def test_answers_up_to_the_last_place_of_the_cache(model):
    """What is guessed must not be written behind the end of the cache, also not for a neighbour's sake."""
    long = Request([1, 2, 3, 4] * 5, GREEDY, 20)
    requests = [long, Request([1, 2] * 3, GREEDY, 30), replace(long, max_new_tokens=3), long]
    plain, ahead = (serve(model, requests, n, rows=3, capacity=40) for n in (0, AHEAD))
    assert [s.tokens for s in ahead] == [s.tokens for s in plain]
    assert [len(s.tokens) for s in ahead] == [20, 30, 3, 20]


def test_a_second_turn_finds_only_tokens_that_were_kept(model):
    """Keys of wrong guesses lie behind the end of the slot; the next turn must not take them for its own."""
    session, fresh = Session(model, AHEAD), lambda: Session(model)
    ids = [1, 2, 3, 1, 2, 3, 1, 2]
    said = list(session.reply(ids, GREEDY, max_new_tokens=15, stop=set()))
    assert said == list(fresh().reply(ids, GREEDY, max_new_tokens=15, stop=set()))
    assert "guessed" in session.speed
    longer = [*ids, *said, 5, 1, 2]
    again = list(session.reply(longer, GREEDY, max_new_tokens=15, stop=set()))
    assert again == list(fresh().reply(longer, GREEDY, max_new_tokens=15, stop=set()))


def test_sampled_answers_have_the_models_distribution():
    """Chi-square of 4,000 answers of three tokens, without a seed, against the model's own probabilities. The prompt
    makes the engine guess the second and third token."""
    model = model_of(vocab_size=4)
    prompt = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3, 0]  # every pair stands there once
    cells = list(product(range(4), repeat=3))
    with torch.inference_mode():
        log_p = model(torch.tensor([[*prompt, *cell] for cell in cells])).logits.div(3).log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + 2)
    chance = [sum(log_p[n, place, token] for place, token in zip(places, cell)) for n, cell in enumerate(cells)]
    chance = torch.stack(chance).exp().double()
    assert chance.sum() == pytest.approx(1, abs=1e-4)

    engine = Engine(model, 50, 20, prompt_lookup_num_tokens=4)
    engine.dice.generator.manual_seed(0)
    request = Request(prompt, Sampling(temperature=3.0, top_p=1.0), 3)
    sequences = [engine.submit(request) for _ in range(4000)]
    while engine.busy:
        engine.step()
    counts = Counter(tuple(sequence.tokens) for sequence in sequences)
    guessed = sum(sequence.guessed for sequence in sequences)
    assert guessed > 500  # the rule was used, and
    assert sum(len(s.tokens) for s in sequences) - guessed > 8000  # it refused as well

    expected = chance * 4000
    seen = torch.tensor([counts[cell] for cell in cells]).double()
    rare = expected < 5  # are one cell
    expected, seen = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (expected, seen))
    chi_square = ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    free = len(expected) - 1
    assert chi_square < free + 4 * (2 * free) ** 0.5  # chance of more: below 1e-3
