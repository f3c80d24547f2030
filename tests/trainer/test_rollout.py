"""Stages whose data the model writes itself: `Job.rollout` (trainer/loop/job.py)."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from common.files import ROOT
from tests.helpers.rollout_run import engine_with_rollout, poison, run
from tests.helpers.rows import write_sft
from trainer.run import resume


def test_units_are_those_of_the_rollout(tmp_path):
    """Every second target is dropped: dividing by the loader's count would halve the loss."""
    write_sft(tmp_path / "sft.jsonl")
    engine = engine_with_rollout(tmp_path, 4, 2)
    batches = engine.loader.batches(0)
    result = engine.train_step(batches)
    trained = sum(int((batch.targets != -100).sum()) for batch in result.batches)
    assert result.units == result.tokens == trained < sum(batch.trained_tokens for batch in batches)
    assert float(sum(result.losses)) / trained == pytest.approx(float(result.metrics["loss"]) / trained, rel=0.01)


def train(folder, sample: bool, stops=()) -> dict[str, torch.Tensor]:
    """Six steps with a signal in the middle of the rollout of each of these steps, and a resume after it."""
    for stop in (*stops, None):
        options = dict(max_steps=6, save_dir=folder / f"out-{len(stops)}", val_fraction=0.1, from_resume="auto")
        engine = engine_with_rollout(folder, 2, 2, sample=sample, **options)
        rollout = engine.job.rollout

        def interrupted(model, batches, step, rollout=rollout, stop=stop):
            half = rollout(model, batches[:1], step)
            if step == stop:
                signal.raise_signal(signal.SIGTERM)
            return rollout(model, batches[1:], step) + half

        engine.job.rollout = interrupted
        if stop is None:
            engine.run()
        else:
            with pytest.raises(SystemExit):
                engine.run()
            assert engine.step == stop + 1, "a step that has begun is finished"
    (state,) = (folder / f"out-{len(stops)}").glob("resume/*/*/step_00000006")
    tensors, _ = resume.read_state(state)
    return {**tensors["weights"], **tensors["optimizer"]}


@pytest.mark.parametrize("sample", (False, True))
def test_a_stopped_run_continues_bit_for_bit(sample, tmp_path):
    """Sampled targets also depend on torch's generator: its state is part of what is resumed."""
    write_sft(tmp_path / "sft.jsonl")
    undisturbed, stopped = train(tmp_path, sample), train(tmp_path, sample, stops=(1, 3))
    assert undisturbed.keys() == stopped.keys()
    assert all(torch.equal(undisturbed[name], stopped[name]) for name in undisturbed)


def test_a_rollout_that_a_ctrl_c_breaks_takes_the_step_back(tmp_path):
    """The terminal also sends it to the processes that a rollout has started, and these fail."""
    write_sft(tmp_path / "sft.jsonl")
    engine = engine_with_rollout(tmp_path, 4, 1, sample=True, max_steps=6)
    rollout, random = engine.job.rollout, {}

    def broken(model, batches, step):
        random[step] = torch.get_rng_state()
        answered = rollout(model, batches, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("the process that judges the answers was killed")
        return answered

    engine.job.rollout = broken
    with pytest.raises(SystemExit) as end:
        engine.run()
    assert end.value.code == 130 and engine.step == 2 and torch.equal(torch.get_rng_state(), random[2])


def test_bad_batches_names_the_rows_that_the_rollout_used(tmp_path):
    """The micro-batches come in reverse order: computing them again would name the wrong rows."""
    write_sft(tmp_path / "sft.jsonl")
    engine = engine_with_rollout(tmp_path, 2, 3, max_steps=5)
    culprit = engine.loader.batches(2)[0].examples[0]
    poison(engine, culprit)
    with pytest.raises(ValueError, match="the loss is not finite at step 3"):
        engine.run()
    (path,) = tmp_path.glob("out/runs/*/bad_batches.jsonl")
    (batch,) = json.loads(path.read_text(encoding="utf-8"))["batches"]
    assert engine.job.data.train.source(culprit) in batch["rows"]
    assert batch["micro_batch"] == len(engine.loader.batches(2)) - 1


def test_two_processes_train_what_one_does(tmp_path):
    """2 processes x 2 micro-batches x 2 examples against one process with one batch of 8; then NaN in a row of rank 1,
    which rank 0 reports."""
    write_sft(tmp_path / "sft.jsonl")
    one = run(tmp_path, "one", 8, 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(ROOT / "tests" / "helpers" / "rollout_run.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], abs=1e-5)
    for name, expected in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], expected, atol=1e-5, rtol=1e-4)
    for found in (first, second):
        assert "not finite at step 5" in found["message"] and first["culprit"] in found["message"]
    (path,) = tmp_path.glob("two/runs/*/bad_batches.jsonl")
    (batch,) = json.loads(path.read_text(encoding="utf-8"))["batches"]
    assert batch["rank"] == 1 and first["culprit"] in batch["rows"]
