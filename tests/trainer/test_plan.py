"""--plan: real steps, nothing left behind, rows that fit; and the figures of a run's speed."""

import re

import pytest
import torch

from common.console import UserError
from model.cost import step_flops
from tests.helpers.rows import write_pretrain, write_sft
from tests.helpers.runs import run_stage, sft_engine
from trainer.run import plan as module
from trainer.run.meter import Meter


def test_a_plan_trains_ten_steps_in_any_stage_and_leaves_nothing(tmp_path, capsys):
    write_pretrain(tmp_path / "text.jsonl", 120)
    data, out = f"--data_path={tmp_path / 'text.jsonl'}", tmp_path / "out"
    flags = [data, f"--save_dir={out}", "--batch_size=4", "--epochs=3", "--use_wandb", "--price_per_hour=3600"]
    with pytest.raises(SystemExit) as end:
        run_stage("pretrain", *flags, "--val_fraction=0.1", "--measure_peak", "--plan")
    text = capsys.readouterr().out
    assert end.value.code == 0 and list(out.iterdir()) == []
    (line,) = re.findall(r"step 10/10  loss [4-8]\.\d+.*", text)  # real ones
    assert "ETA" not in line, "it was that of ten steps in a few milliseconds; the time of the whole run stands below"
    assert f"save_dir={out}" in text and "wandb: " not in text
    assert "--batch_size 4 --accumulation_steps 1" in text and "MFU" in text
    total = int(re.search(r"; (\d+) steps in all", text)[1])
    assert f" for {total} steps" in text

    run_stage("pretrain", *flags[:2], "--max_steps=1")
    left = sorted(path.name for path in out.iterdir())
    write_sft(tmp_path / "chat.jsonl")
    with pytest.raises(SystemExit):
        run_stage("full_sft", f"--data_path={tmp_path / 'chat.jsonl'}", f"--save_dir={out}", "--max_steps=6", "--plan")
    text = capsys.readouterr().out
    assert "plan, from 6 real steps" in text and "for 6 steps" in text and "cost     with --price_per_hour" in text
    assert sorted(path.name for path in out.iterdir()) == left, "what other runs have left is still there, nothing else"


def test_a_plan_refuses_what_the_continued_run_would_refuse(tmp_path, capsys):
    """It never looked for the state, so it planned with a batch, or with steps, that the run then did not take."""
    write_sft(tmp_path / "sft.jsonl")
    first = sft_engine(tmp_path, 4, 2, max_steps=8)
    first.step = 7
    first.save()
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    for said, batch_size, steps in [("give --batch_size 1 or 2 or 4 or 8", 3, 8), ("has done 7 steps", 4, 4)]:
        messages = set()
        for plan in (True, False):
            with pytest.raises(UserError, match=said) as no:
                sft_engine(tmp_path, batch_size, 1, max_steps=steps, from_resume="auto", plan=plan)
            messages.add(str(no.value))
        assert len(messages) == 1

    engine = sft_engine(tmp_path, 2, 1, max_steps=8, from_resume="auto", plan=True)
    with pytest.raises(SystemExit):
        engine.run()
    text = capsys.readouterr().out
    assert "--accumulation_steps 4 instead of 1" in text and "--batch_size 2 --accumulation_steps 4" in text
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == left


def test_the_whole_run_is_the_steps_and_what_comes_between(tmp_path, monkeypatch, capsys):
    """1,003 steps: 3 slow ones took 9 s in all, 1,000 at 0.5 s; save_interval 100 makes 11 saves (the last at the end)
    of 2 s and as many validations of 1 s: 9 + 500 + 22 + 11 = 542 s. At 20 an hour: 3.01."""
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 2, price_per_hour=20, save_interval=100)
    engine.total = 1003
    capsys.readouterr()
    seconds = dict(first=9.0, step=0.5, save=2.0, validation=1.0, took=20)
    module.report(engine, 4, dict(**seconds, steps=10, tokens=600, memory=1.5))
    text = capsys.readouterr().out
    assert "4 rows at once fit, not 8: --batch_size 4 --accumulation_steps 4" in text
    assert "time     0:09:02 for 1,003 steps (0:00:33 of it" in text and "1,200 trained tokens/s" in text
    assert "cost     3.01 at 20 an hour" in text and "1.50 GiB" in text


@pytest.mark.parametrize("free, fits", [(100.0, 12), (12.0, 6), (8.5, 3), (4.0, 1)])
def test_the_rows_that_fit_are_foretold_and_not_tried(tmp_path, monkeypatch, free, fits):
    """A row takes 1 GiB beside 3 for the model: 12 rows 15, 6 rows 9, 3 rows 6. With 12 GiB free, 11.04 to plan with,
    12 rows do not fit; and nothing that does not fit may be tried, since a CPU's memory ends the process."""
    write_sft(tmp_path / "sft.jsonl")
    engine, tried = sft_engine(tmp_path, 12, 2), []
    monkeypatch.setattr(module, "free_memory", lambda device: free)
    monkeypatch.setattr(module, "trial", lambda engine, rows: tried.append(rows) or 3.0 + rows)
    assert module.rows_that_fit(engine) == fits
    assert 3.0 + max(tried) <= module.USABLE_SHARE * free or free < 5


def test_all_ranks_try_the_same_rows(tmp_path, monkeypatch):
    """Each rank went by its own peak. Where one was above the limit and another below, they tried different rows, and
    waited for each other until one gave up."""
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 4, 1)
    monkeypatch.setattr(module, "peak_memory", lambda: 5.0)
    monkeypatch.setattr(engine, "train_step", lambda batches: None)
    monkeypatch.setattr(engine.backend, "all_reduce_max", lambda own: own.clamp(min=7.0))  # another rank's
    assert module.trial(engine, 2) == 7.0


def test_a_device_that_runs_out_of_memory_gets_fewer_rows(tmp_path, monkeypatch, capsys):
    """Four rows at once are too many for the device, which only says so once they are there."""
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1, plan=True)
    update = engine.train_step

    def cramped(batches):
        if max(len(batch.tokens) for batch in batches) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return update(batches)

    monkeypatch.setattr(engine, "train_step", cramped)
    with pytest.raises(SystemExit):
        module.plan(engine)
    assert "2 rows at once fit, not 8: --batch_size 2 --accumulation_steps 4" in capsys.readouterr().out


def test_fewer_rows_at_once_are_the_same_step(tmp_path):
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 2)
    before = [engine.loader.examples(step).tolist() for step in range(3)]
    module.set_rows(engine, 2)
    assert engine.loader.batch_size == 2 and [engine.loader.examples(step).tolist() for step in range(3)] == before


def test_mfu_is_the_work_of_the_batches_over_what_the_device_can_do(tmp_path, monkeypatch):
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1)
    monkeypatch.setattr("trainer.run.meter.gemm_rate", lambda *_: 1e9)
    meter = Meter(engine.model, torch.float32, torch.device("cpu"), measure_peak=True)
    batches = engine.loader.batches(0)
    meter.go()
    now = [meter.since + 2.0]
    monkeypatch.setattr("trainer.run.meter.time.perf_counter", lambda: now[0])
    meter.add({"loss": torch.tensor(60.0)}, 30, 30, torch.tensor(0.0), batches)
    figures = meter.read(engine.backend)
    work = sum(step_flops(engine.model.config, b.tokens.numel(), 32, b.selected.numel()) for b in batches)
    assert figures == {"loss": 2.0, "tokens_per_second": 15.0, "mfu": pytest.approx(work / 2 / 1e9)}
    meter.add({"loss": torch.tensor(float("nan"))}, 30, 30, torch.tensor(1.0), batches)
    assert meter.read(engine.backend)["loss"] == 2.0, "a bad step counts for nothing"


def test_what_saving_takes_is_not_counted_as_training(tmp_path, monkeypatch):
    """Saving at step 14 of 15 used to set the clock back to 0 and leave the tokens: 17 times the speed. A run that goes
    on has the time of what it goes on from."""
    write_sft(tmp_path / "sft.jsonl")
    engine = sft_engine(tmp_path, 8, 1)
    now = [100.0]
    monkeypatch.setattr("trainer.run.meter.time.perf_counter", lambda: now[0])
    meter = Meter(engine.model, torch.float32, torch.device("cpu"), measure_peak=False)
    meter.go()
    meter.add({"loss": torch.tensor(60.0)}, 30, 30, torch.tensor(0.0), [])
    now[0] += 2  # the steps
    meter.pause()
    now[0] += 50  # the save
    window = meter.gather(engine.backend)
    meter.go()
    now[0] += 1
    assert meter.read(engine.backend)["tokens_per_second"] == 10.0

    later = Meter(engine.model, torch.float32, torch.device("cpu"), measure_peak=False)
    later.restore(["loss"], window, engine.backend)
    now[0] += 500
    later.go()
    now[0] += 1
    assert later.read(engine.backend) == {"loss": 2.0, "tokens_per_second": 10.0}
