"""When the thread of the engines tells the clients what is new: seldom enough to cost little, at once where somebody
waits for it."""

from types import SimpleNamespace

import pytest

from serve import runner as module
from serve.runner import LONGEST, MESSAGE_SECONDS, SHARE, Runner

STEP = 0.01  # seconds of the test's clock


class Scripted:
    """An engine whose sequences all get a token a step; `also(step, sequences)` does what else happens in it."""

    def __init__(self, runner: Runner, count: int, steps: int, also=lambda step, sequences: None):
        self.sequences = [Named(tokens=[0] * 10) for _ in range(count)]
        self.runner, self.steps, self.also, self.step_number = runner, steps, also, 0

    @property
    def busy(self) -> bool:
        return True

    def step(self) -> list:
        self.step_number += 1
        self.runner.stopping = self.step_number == self.steps
        self.runner.clock += STEP
        for sequence in self.sequences:
            sequence.tokens.append(0)
        self.also(self.step_number, self.sequences)
        return list(self.sequences)


class Named(SimpleNamespace):
    """Told apart by what it is, not by what is in it."""

    finish_reason, error = None, None
    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.fixture
def told(monkeypatch):
    """told(count, steps, also) -> [(step, the numbers of the sequences that were told of)]"""

    def run(count, steps, also=lambda step, sequences: None):
        runner = Runner(max_waiting=0)
        runner.clock = 100.0
        engine, found = Scripted(runner, count, steps, also), []
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: runner.clock))
        number = {sequence: n for n, sequence in enumerate(engine.sequences)}
        note = lambda news: found.append((engine.step_number, sorted(number[s] for s in news))) if news else None
        monkeypatch.setattr(runner, "_tell", lambda news: (note(news), news.clear()))
        runner.engines.append(engine)
        runner._run()
        return found

    return run


def test_one_answer_is_told_token_by_token(told):
    assert told(1, 50) == [(step, [0]) for step in range(1, 51)]


@pytest.mark.parametrize("count", [4, 16])
def test_messages_take_their_share_of_the_time(told, count):
    found = told(count, 500)
    assert all(len(news) == count for _, news in found)
    messages = sum(len(news) for _, news in found)
    assert 0.6 * SHARE < messages * MESSAGE_SECONDS / (500 * STEP) <= SHARE * 1.02


def test_no_news_waits_for_long(told):
    steps = [step for step, _ in told(500, 100)]
    assert max(b - a for a, b in zip(steps, steps[1:])) * STEP <= LONGEST + STEP


def test_a_beginning_and_an_end_are_told_at_once_and_alone(told):
    """With every one of them, the news of all others was told too: the shorter the answers, the more messages."""

    def also(step, sequences):
        if step == 3:
            sequences[2].tokens = [0]
        elif step == 5:
            sequences[1].tokens = [0, 0]  # the first two together
        elif step == 8:
            sequences[0].finish_reason = "stop"

    found = told(16, 9, also)
    assert found[0] == (1, list(range(16)))  # long since the last time
    assert (3, [2]) in found and (5, [1]) in found and (8, [0]) in found
    assert [len(news) for step, news in found if step in (3, 5)] == [1, 1]
