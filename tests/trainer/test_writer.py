"""Saving while training goes on: the files of a save hold the step that it was made after, and no error is lost."""

import threading
import time

import pytest
import torch

from tests.helpers.compare import same
from tests.helpers.rows import write_sft
from tests.helpers.runs import sft_engine
from trainer.run import resume
from trainer.run.writer import Writer


def test_jobs_are_done_in_order_and_meanwhile():
    writer, go, done = Writer(background=True), threading.Event(), []
    writer.write(lambda: go.wait(10) and done.append(1))
    writer.write(lambda: done.append(2))
    writer.check()
    assert done == [], "nothing has waited for the first"
    go.set()
    writer.wait()
    assert done == [1, 2]


def test_no_more_than_two_jobs_are_waiting():
    """A disk that is slower than the steps: copies of the weights would fill the memory."""
    writer, running = Writer(background=True), []
    for number in range(4):
        writer.write(lambda number=number: running.append(number) or time.sleep(0.05))
        assert number - len(running) < 2
    writer.wait()


def test_an_error_is_raised_after_the_next_step_or_at_the_end():
    def fail():
        raise OSError(28, "No space left on device")

    writer = Writer(background=True)
    writer.write(fail)
    time.sleep(0.05)
    with pytest.raises(OSError, match="No space left"):
        writer.check()
    writer.check()  # once
    writer.write(fail)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    with pytest.raises(OSError, match="No space left"):
        Writer(background=False).write(fail)


def test_only_a_thread_needs_copies():
    tensor = torch.ones(2)
    assert Writer(background=False).keep({"a": tensor})["a"] is tensor
    kept = Writer(background=True).keep({"a": tensor})
    tensor.zero_()
    assert kept["a"].tolist() == [1, 1]


def test_a_slow_disk_saves_the_step_it_was_asked_to(tmp_path, monkeypatch):
    """The first state is written while the next steps run. It has the weights, moments and random states of its own
    step, as a run without a thread has them."""
    write_sft(tmp_path / "sft.jsonl")
    write, states = resume.write_state, {}
    for background in (False, True):
        options = dict(save_interval=2, max_steps=6, keep_last=9, save_dir=tmp_path / f"out{background}")
        engine = sft_engine(tmp_path, 8, 1, **options)
        engine.writer, seen = Writer(background), []
        monkeypatch.setattr(resume, "write_state", lambda *arguments: time.sleep(0.2) or write(*arguments))
        step = engine.train_step
        engine.train_step = lambda batches, e=engine, s=step, n=seen: n.append(len(e.writer.pending)) or s(batches)  # noqa: B023
        weights = engine.run()
        assert any(seen) == background, "a step was computed while a state was written"
        found = [resume.read_state(path)[0] for path in sorted(engine.states.glob("step_*"))]
        states[background] = [{**t["weights"], **t["optimizer"], **t["ranks"]} for t in found]
        assert weights.is_file() and len(found) == 3
    for alone, beside in zip(states[False], states[True]):
        alone.pop("window"), beside.pop("window")  # seconds are among the sums
        assert same(alone, beside)


def test_a_run_whose_disk_is_full_ends_with_the_error(tmp_path, monkeypatch):
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1, save_interval=1, max_steps=50, save_dir=tmp_path / "out")
    engine.writer = Writer(background=True)

    def full(*_):
        raise OSError(28, "No space left on device", "weights.safetensors")

    monkeypatch.setattr(resume, "write_state", full)
    with pytest.raises(OSError, match="No space left"):
        engine.run()
    assert engine.step < 5


def test_a_finished_run_keeps_one_state(tmp_path):
    """Two while it goes on; --keep_last is kept to the letter."""
    write_sft(tmp_path / "sft.jsonl")
    for given, left in ((dict(), [6]), (dict(keep_last=2), [4, 6])):
        options = dict(save_interval=2, max_steps=6, save_dir=tmp_path / f"out{len(given)}")
        engine = sft_engine(tmp_path, 8, 1, **options, **given)
        engine.run()
        assert [int(path.name[5:]) for path in sorted(engine.states.iterdir())] == left


def test_validation_on_some_of_the_rows(tmp_path):
    write_sft(tmp_path / "sft.jsonl", rows=60)
    whole = sft_engine(tmp_path, 8, 1, val_fraction=0.2).job.data.val
    some = sft_engine(tmp_path, 8, 1, val_fraction=0.2, val_limit=3).job.data.val
    assert len(whole) == 12 and some.order.tolist() == whole.order[[0, 5, 11]].tolist()
