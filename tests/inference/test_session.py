"""What a conversation keeps of the text it has read never changes an answer."""

import pytest

from inference.generate import generate
from inference.sampling import Sampling
from inference.session import Session
from tests.helpers.models import TOKENIZER, small_model

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model():
    return small_model(std=0.2).eval()


def answers(session, prompt):
    return list(session.reply(prompt, GREEDY, max_new_tokens=8, stop=TOKENIZER.stop_ids))


def test_answers_from_the_kept_cache_are_those_of_a_fresh_one(model):
    session, text = Session(model), "user: "
    first = TOKENIZER.encode(text + "你好")
    reply = answers(session, first)
    longer = first + reply + TOKENIZER.encode("and then? " * 20)  # outgrows nothing: the cache doubles when it is made
    other = first[:2] + TOKENIZER.encode("something else")
    for prompt in (longer, other, other, first, TOKENIZER.encode("no word in common " * 40)):
        assert answers(session, prompt) == generate(model, [prompt], GREEDY, max_new_tokens=8)[0]
    answers(session, first)
    answers(session, first + reply + [5])
    assert f"read 2 tokens ({len(first) + len(reply) - 1} from the cache)" in session.speed


@pytest.mark.parametrize("call", [1, 2, 3, 6])
def test_an_interrupt_between_two_layers_does_not_spoil_the_cache(model, monkeypatch, call):
    """cache.length alone cannot decide what is kept: in mid-token the second layer's keys are still of older text."""
    session, calls = Session(model), []
    prompt = TOKENIZER.encode("an old text that fills the cache " * 4)
    answers(session, prompt)
    second = model.model.layers[1]

    def pressed(*args, original=second.forward):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(second, "forward", pressed)
    prompt, said = TOKENIZER.encode("hello there"), []
    with pytest.raises(KeyboardInterrupt):
        for token in session.reply(prompt, GREEDY, max_new_tokens=8, stop=set()):
            said.append(token)
    assert len(said) == call - 1
    more = prompt + said + generate(model, [prompt + said], GREEDY, max_new_tokens=1)[0] + TOKENIZER.encode("go on")
    assert answers(session, more) == generate(model, [more], GREEDY, max_new_tokens=8)[0]
