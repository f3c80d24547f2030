"""A step that is not finite changes nothing, nothing is saved after it, its rows are named; a spike is reported."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.faults.bad_steps import poison
from tests.helpers.rows import write_sft
from tests.helpers.runs import sft_engine
from trainer.loop.backend import Backend
from trainer.loop.step import StepResult
from trainer.loop.watchdog import INITIAL_LOSS_SCALE, Watchdog
from trainer.run import resume

NAN = float("nan")


def reports(tmp_path) -> list[dict]:
    (path,) = tmp_path.glob("out/runs/*/bad_batches.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def states(tmp_path) -> list[int]:
    return sorted(int(path.name[5:]) for path in tmp_path.glob("out/resume/*/*/step_*"))


@pytest.mark.parametrize("where", ("loss", "gradient"))
def test_stop_names_the_rows_and_saves_nothing(where, tmp_path):
    """40 rows, 8 a step in micro-batches of 2 rows: what is poisoned is in the third step."""
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 2, 4, max_steps=5, save_interval=1, val_interval=1, keep_last=9)
    culprit = int(engine.loader.examples(2)[3])
    poison(engine, where, culprit)
    with pytest.raises(ValueError, match=f"the {where} is not finite at step 3.*sft.jsonl:.*--on_nan skip"):
        engine.run()
    assert states(tmp_path) == [1, 2]
    tensors, _ = resume.read_state(next(tmp_path.glob("out/resume/*/*/step_00000002")))
    moments = resume.optimizer_tensors(engine.model, engine.optimizers)
    assert all(torch.equal(p, tensors["weights"][n]) for n, p in engine.model.named_parameters())
    assert all(torch.equal(moments[n], t) for n, t in tensors["optimizer"].items())

    (report,) = reports(tmp_path)
    assert report["step"] == 3 and report["reason"] == f"the {where} is not finite"
    batches = engine.loader.batches(2)
    holding = [i for i, batch in enumerate(batches) if culprit in batch.examples]
    # a loss tells its micro-batch; a gradient is one for the whole step
    expected = holding if where == "loss" else list(range(len(batches)))
    assert [batch["micro_batch"] for batch in report["batches"]] == expected and len(batches) > 1
    rows = [row for batch in report["batches"] for row in batch["rows"]]
    assert engine.job.data.train.source(culprit) in rows
    assert len(rows) == sum(len(batches[i].examples) for i in expected)


def test_skip_leaves_the_step_out_and_saves_after_the_next_good_one(tmp_path):
    """Steps 2 and 3 are bad. The save that was due at 2 waits for 4; step 3's as well."""
    write_sft(tmp_path / "sft.jsonl")
    options = dict(max_steps=5, save_interval=2, keep_last=2, on_nan="skip", max_bad_steps=2, log_interval=1)
    engine = sft_engine(tmp_path, 8, 1, **options)
    after, train_step, objective = {}, engine.train_step, engine.job.objective

    def watched(batches):
        result = train_step(batches)
        after[engine.step + 1] = [p.detach().clone() for p in engine.model.parameters()]
        return result

    class Poisoned(type(objective)):
        def __call__(self, model, batch):
            loss, metrics = objective(model, batch)
            return (loss * NAN, {"loss": metrics["loss"] * NAN}) if engine.step in (1, 2) else (loss, metrics)

    engine.job.objective, engine.train_step = Poisoned(), watched
    engine.run()
    same = lambda a, b: all(map(torch.equal, after[a], after[b]))
    assert same(1, 2) and same(2, 3) and not same(3, 4)
    assert states(tmp_path) == [4, 5]
    assert [report["step"] for report in reports(tmp_path)] == [2, 3]
    (metrics,) = tmp_path.glob("out/runs/*/metrics.jsonl")
    losses = [json.loads(line).get("loss") for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert losses[1] is losses[2] is None and all(losses[i] > 0 for i in (0, 3, 4))


def test_skip_has_a_cap(tmp_path):
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1, max_steps=9, save_interval=1, on_nan="skip", max_bad_steps=2, seed=1)
    engine.job.objective = type(
        "Bad",
        (),
        dict(
            count=engine.job.objective.count,
            __call__=lambda self, model, batch: (
                (loss := NAN * next(model.parameters()).sum()),
                {"loss": loss.detach()},
            ),
        ),
    )()
    with pytest.raises(ValueError, match="not finite at step 3.*the 2 bad steps before it.*--max_bad_steps"):
        engine.run()
    assert len(reports(tmp_path)) == 3 and not states(tmp_path)


class Say(list):
    __call__ = list.append


def watchdog(tmp_path, scaled=False, **changes) -> tuple[Watchdog, Say]:
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 4, 1, **changes)
    said, path = Say(), tmp_path / "out" / "runs" / "x" / "bad_batches.jsonl"
    return Watchdog(engine.config, Backend(torch.device("cpu")), engine.job.data.train.source, scaled, path, said), said


def step(watch: Watchdog, number: int, loss: float, norm: float = 1.0, bad: float = 0.0, units: float = 1.0) -> None:
    """Records a step of one micro-batch, computed from the examples 3 and 5."""
    batch = SimpleNamespace(examples=(3, 5))
    tensors = [torch.tensor(value) for value in (norm, bad)]
    watch.record(number, StepResult([batch], units, 1, [torch.tensor(loss)], {}, *tensors))


def test_a_spike_is_reported_and_trained_on(tmp_path):
    """Losses 2.0 and 2.1 in turn: mean 2.05, deviation 0.05. 2.3 is 5 of them above, 2.4 is 7."""
    watch, said = watchdog(tmp_path, spike_sigma=6)
    for number in range(1, 31):
        step(watch, number, 2.0 + 0.1 * (number % 2))
    step(watch, 31, 2.3)
    assert watch.check() and not said
    watch.recent.pop()
    step(watch, 32, 2.4)
    assert watch.check()
    assert len(said) == 1 and said[0].startswith("loss spike at step 32: 2.4000, 7.0 sigma above 2.0500, in ")
    (report,) = reports(tmp_path)
    (batch,) = report["batches"]
    assert report["step"] == 32 and batch["rows"] == [watch.source(3), watch.source(5)]
    assert batch["rows"][0].endswith("sft.jsonl:4")


def test_fp16_overflow_halves_the_scale_and_is_no_error(tmp_path):
    watch, said = watchdog(tmp_path, scaled=True)
    step(watch, 1, 2.0, norm=float("inf"), bad=1.0)
    assert watch.check() and watch.scale == INITIAL_LOSS_SCALE / 2 and not said
    step(watch, 2, NAN, norm=NAN, bad=1.0)  # no scale helps here
    with pytest.raises(ValueError, match="the loss is not finite at step 2"):
        watch.check()


def test_steps_between_two_looks_are_all_judged(tmp_path):
    """On an accelerator only every tenth step is looked at; a bad one in between must still be found."""
    watch, said = watchdog(tmp_path, on_nan="skip")
    for number in range(1, 6):
        step(watch, number, NAN if number == 3 else 2.0, bad=float(number == 3))
    assert watch.check()  # the newest is sound
    assert len(said) == 1 and "at step 3" in said[0] and [r["step"] for r in reports(tmp_path)] == [3]


def test_a_loss_scale_belongs_to_fp16(tmp_path):
    """A run in bf16 goes on in fp16, and back: a scale of 1 would let gradients vanish and call the first overflow an
    end, and one of 16384 would let bf16 pass over real NaN as if they were overflows."""
    for scale, scaled, expected in ((1.0, True, INITIAL_LOSS_SCALE), (2.0**9, True, 2.0**9), (2.0**14, False, 1.0)):
        folder = tmp_path / f"{scale}-{scaled}"
        folder.mkdir()
        write_sft(folder / "sft.jsonl")
        first = sft_engine(folder, 8, 1, max_steps=2)
        first.watch.scale = scale
        first.save()
        (state,) = folder.glob("out/resume/*/*/step_*")
        second = sft_engine(folder, 8, 1, max_steps=2)
        second.watch = Watchdog(
            second.config, second.backend, second.job.data.train.source, scaled, folder / "x.jsonl", print
        )
        second._restore(state)
        assert second.watch.scale == expected


def test_a_scale_of_one_grows_again(tmp_path):
    watch, _ = watchdog(tmp_path, scaled=True)
    watch.scale, watch.good = 1.0, 1999
    step(watch, 1, 4.0, units=4.0)
    assert watch.check() and watch.scale == 2.0


def test_a_resumed_run_in_fp16_goes_on_with_its_scale(tmp_path):
    """A scale that had fallen to 1 began again at 2^14, and the good steps before the stop did not count."""
    first, second, bf16 = watchdog(tmp_path, scaled=True)[0], watchdog(tmp_path, scaled=True)[0], watchdog(tmp_path)[0]
    first.scale, first.good = 1.0, 1999
    second.restore(first.state())
    step(second, 1, 4.0, units=4.0)
    assert second.check() and second.scale == 2.0
    second.restore(bf16.state())
    bf16.restore(first.state() | dict(scale=2.0**9))
    assert second.scale == 2.0 and bf16.scale == 1.0
    second.restore(dict(scale=2.0**9))  # of an older version
    assert second.scale == 2.0**9 and second.good == 0


def test_an_overflow_begins_the_count_of_good_steps_anew(tmp_path):
    """2,000 good steps in a row double the scale. After 1,999 and an overflow, the next good one is the first."""
    watch, _ = watchdog(tmp_path, scaled=True)
    watch.good = 1999
    step(watch, 1, 2.0, norm=float("inf"), bad=1.0)
    step(watch, 2, 2.0)
    assert watch.check() and watch.scale == INITIAL_LOSS_SCALE / 2
