"""What is generated is what the full pass over all of the text would say, whoever else is answered, and however."""

from types import SimpleNamespace

import pytest
import torch

from inference import generate as generating
from inference.engine import Engine
from inference.generate import generate
from inference.sampling import Sampling
from model.config import ModelConfig
from model.cost import cache_bytes
from tests.helpers.models import SPEAKER_SHAPE, SPEAKERS, continuation, random_model

SHAPE, KINDS = SPEAKER_SHAPE, SPEAKERS
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 6, 7], [9], list(range(20, 31)), [44] * 6, [5, 6, 8]]


@pytest.fixture(params=KINDS)
def model(request):
    return random_model(ModelConfig(**SHAPE, **KINDS[request.param]), std=0.2, seed=1).eval()


@pytest.fixture(scope="module")
def dense():
    return random_model(ModelConfig(**SHAPE), std=0.2, seed=1).eval()


@pytest.mark.parametrize("rows", (1, 2, 64))
def test_many_are_what_each_is_without_a_cache(model, rows):
    together = generate(model, PROMPTS, GREEDY, max_new_tokens=12, rows=rows)
    assert together == [continuation(model, prompt, 12) for prompt in PROMPTS]


def test_a_stop_token_ends_its_answer_only(model):
    free = [continuation(model, prompt, 10) for prompt in PROMPTS]
    stop = {free[0][4]}
    ended = generate(model, PROMPTS, GREEDY, max_new_tokens=10, stop=stop)
    assert ended == [continuation(model, prompt, 10, stop) for prompt in PROMPTS] and len(ended[0]) <= 4


def test_each_prompt_may_have_its_own_number_of_tokens(dense):
    lengths, told = [3, 0, 7, 1, 5], []
    replies = generate(dense, PROMPTS, GREEDY, max_new_tokens=lengths, rows=2, ended=told.append)
    assert replies == [continuation(dense, prompt, most) for prompt, most in zip(PROMPTS, lengths)]
    assert sum(told) == 5 and max(told) <= 2, "progress is told while it goes on"


def test_when_an_answer_ends_the_next_prompt_takes_its_row(dense, monkeypatch):
    """A batch that goes on until its longest answer ends computes rows that say nothing, and then waits with the rest.
    Here 16 prompts say one word, one says 40; beside it, the others need two rows for one step each."""
    prompts = [[n, n + 1] for n in range(17)]
    steps, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: steps.append(len(engine.running)) or step(engine))
    generate(dense, prompts, GREEDY, max_new_tokens=[40] + [2] * 16, rows=3)
    assert len(steps) <= 45 and max(steps) <= 3


def test_the_repetition_penalty_leaves_end_tokens_alone(model):
    """Every turn of a chat ends with one, so the prompt is full of them: penalised, the model did not stop."""
    prompt = next(p for a in range(97) for b in range(97) if continuation(model, p := [a, b], 1) == [a] and a != b)
    strong = Sampling(temperature=0, repetition_penalty=1e6)
    assert generate(model, [prompt], strong, max_new_tokens=1, stop={prompt[0], 5000}) == [[]]
    assert generate(model, [prompt], strong, max_new_tokens=1)[0] not in ([prompt[0]], [prompt[1]])


def test_the_penalty_counts_the_prompt_and_what_was_said(model):
    """So large a penalty that nothing is said twice, neither of the prompt nor of the reply itself."""
    once = Sampling(temperature=0, repetition_penalty=1e9)
    prompts = [[5, *continuation(model, [5, 6, 7], 1)], [9]]  # without the penalty, more of the same would follow
    for prompt, reply in zip(prompts, generate(model, prompts, once, max_new_tokens=40)):
        assert len(set(reply)) == 40 and not set(reply) & set(prompt)


def test_a_seed_says_the_same_and_each_prompt_has_its_own_numbers(dense):
    say = lambda prompts, seed, rows=64: generate(
        dense, prompts, Sampling(temperature=1.5, seed=seed), max_new_tokens=20, rows=rows
    )
    same = [[5, 6]] * 3
    first, second, third = say(same, 3)
    assert first != second != third != first, "the same prompt is answered in three ways"
    assert say(same, 3, rows=1) == [first, second, third] and say(same[:2], 4) == [second, third]
    assert say(same[:2], 2**63 - 1)[1] == say(same[:1], 0)[0], "after the largest one, as on the server"


def test_the_last_position_is_used():
    model = random_model(ModelConfig(**SHAPE, max_position_embeddings=8), std=0.2, seed=1).eval()
    assert generate(model, [[1, 2, 3]], GREEDY, max_new_tokens=5) == [continuation(model, [1, 2, 3], 5)]
    with pytest.raises(ValueError, match="a prompt of 3 tokens and 6 new ones exceed the model's 8 positions"):
        generate(model, [[1, 2, 3]], GREEDY, max_new_tokens=6)


def test_what_cannot_be_answered_is_refused(dense):
    assert generate(dense, [], max_new_tokens=3) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(dense, [[1], []], max_new_tokens=3)
    broken = random_model(ModelConfig(**SHAPE), std=0.2).eval()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        generate(broken, [[1]], GREEDY, max_new_tokens=3)


def test_a_gpu_answers_as_many_at_once_as_it_has_room_for(dense, monkeypatch):
    """One prompt of 30,000 tokens among 63 short ones: 64 times its room is more than many cards have."""
    monkeypatch.setattr(generating, "_free_bytes", lambda device: 2 * 10 * cache_bytes(dense.config, 1, 100, width=2))
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    inside = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
    there = SimpleNamespace(config=dense.config, compute_dtype=torch.bfloat16, model=inside)
    assert [generating.rows_that_fit(there, capacity) for capacity in (100, 201, 9999)] == [10, 4, 1]
    expected, running, step = generate(dense, PROMPTS, GREEDY, max_new_tokens=4), [], Engine.step
    monkeypatch.setattr(generating, "rows_that_fit", lambda model, capacity: 2 if capacity == 15 else 64)
    monkeypatch.setattr(Engine, "step", lambda engine: running.append(engine.rows) or step(engine))
    assert generate(dense, PROMPTS, GREEDY, max_new_tokens=4) == expected and set(running) == {2}
