"""The trials of benchmarks/real_data/recipe.py are what their lines say; unchanged, they train as the library does."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from benchmarks.real_data.recipe import MODERN, NAMED, Trial, places, rate_at, read_trials, rows_of_steps
from dataset.batches.loader import Loader
from trainer.loop.optim import learning_rate


def test_a_line_is_a_trial_for_each_combination():
    trials = read_trials(["# rates", "learning_rate=1e-3,2e-3 seed=0,1", "", "optimizer=muon steps=175  # short"])
    assert [(t.learning_rate, t.seed) for t in trials[:4]] == [(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]
    assert trials[4] == Trial(optimizer="muon", steps=175) and trials[4].name == "optimizer=muon steps=175"
    assert trials[0].name == trials[1].name, "seeds of one setting are compared"
    for lines in NAMED.values():
        assert read_trials(lines)


def test_each_ingredient_of_modern_has_a_trial_of_its_own():
    """Every setting is changed by a line that changes nothing else; what is left out is the size of a trial."""
    (modern,), size = read_trials([MODERN]), {"steps", "rows", "length", "preset", "width", "layers", "seed"}
    trials = [asdict(trial) for trial in read_trials(NAMED["ingredients"])]
    tried = [{name for name, value in asdict(modern).items() if trial[name] != value} for trial in trials]
    assert all(len(changed) == 1 for changed in tried)
    assert set.union(*tried) == asdict(modern).keys() - size


@pytest.mark.parametrize("schedule", ("cosine", "wsd", "constant"))
def test_the_schedule_is_the_librarys(schedule):
    trial = Trial(schedule=schedule, steps=200, learning_rate=1.0)
    library = dict(peak=1.0, warmup=trial.warmup, schedule=schedule, floor=trial.min_lr_ratio)
    for step in range(200):
        assert rate_at(trial, step / 200, step, 200) == pytest.approx(learning_rate(step, 200, **library))


def test_a_growing_batch_sees_as_many_tokens():
    """100 steps of 8 rows become 48 of 4, 52 of 8 and 12 of 16: 192 + 416 + 192 rows."""
    counts = rows_of_steps(Trial(steps=100, growth=1))
    assert sum(counts) == sum(rows_of_steps(Trial(steps=100))) == 800
    assert [counts.count(rows) for rows in (4, 8, 16)] == [48, 52, 12] and counts == sorted(counts)


def test_documents_are_numbered_as_the_loader_does():
    tokens = torch.tensor([[5, 0, 5, 5, 0, 0, 5], [0, 5, 5, 5, 5, 5, 0]])
    loader = object.__new__(Loader)
    loader.dataset = type("Data", (), dict(start_of_text=0))
    documents, positions = loader._documents_of_stream(tokens.numpy(), np.ones_like(tokens.numpy()))
    ours = places(tokens, end=0)
    assert ours["documents"].tolist() == documents.tolist() and ours["positions"].tolist() == positions.tolist()
