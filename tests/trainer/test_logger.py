"""The run logger: what a run leaves behind, how a resumed one goes on, and that no failure of it stops training."""

import errno
import json
import sys
import time
import types
from dataclasses import dataclass

import pytest

from trainer.run import logger as module
from trainer.run.logger import RunLogger, draw_losses, read_metrics
from trainer.stage import StageConfig


@dataclass(frozen=True)
class Stage(StageConfig):
    save_weight: str = "full_sft"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "out" / "runs" / "full_sft-1"


def steps(run_dir) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_leaves_its_numbers_its_config_and_a_picture(run_dir, capsys):
    logger = RunLogger.create(run_dir, Stage(batch_size=4))
    logger.print("4,194 examples")
    logger.start(0, 1200)
    logger.log(10, loss=3.25, lr=5e-4, grad_norm=0.5, tokens=81920, tokens_per_second=5300.4, mfu=0.414)
    logger.log(20, loss=3.0, lr=4e-4, grad_norm=float("inf"), val_loss=3.125, val_bpb=1.5)
    logger.draw()
    logger.close({"loss": 3.0})
    logger.close()

    rows = read_metrics(run_dir / "metrics.jsonl")
    assert rows[0].items() >= {"step": 10, "loss": 3.25, "lr": 5e-4, "tokens": 81920, "mfu": 0.414}.items()
    assert rows[1]["val_bpb"] == 1.5 and rows[1]["grad_norm"] is None, "JSON knows no infinity, and others read this"
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")

    about = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    assert about["config"]["batch_size"] == 4 and "earlier" not in about
    assert about["summary"]["loss"] == 3.0 and about["summary"]["seconds"] > 0
    assert about["command"] and about["versions"]["torch"]

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4,194 examples" and len(lines) == 4
    assert lines[1].startswith("step 10/1,200  loss 3.2500  lr 5.00e-04  grad 0.50  5,300 tok/s  MFU 41%")
    assert "val_loss 3.125  val_bpb 1.5" in lines[2] and "81920" not in lines[1]


def test_numbers_are_on_the_disk_as_soon_as_they_are_logged(run_dir):
    logger = RunLogger.create(run_dir, Stage())
    logger.start(0, 100)
    logger.log(10, loss=1.0)
    assert steps(run_dir) == [10], "a killed run must not lose what it had logged"


def test_a_resumed_run_goes_on_in_the_same_files(run_dir):
    """Killed after step 50, resumed from the state saved at 30: 40 and 50 happen again and must not be there twice."""
    logger = RunLogger.create(run_dir, Stage())
    logger.start(0, 100)
    for step in (10, 20, 30, 40, 50):
        logger.log(step, loss=1.0)
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 60, "lo')  # the kill came in the middle of a line

    again = RunLogger.create(run_dir, Stage(from_resume="auto"))
    again.start(30, 100)
    assert steps(run_dir) == [10, 20, 30]
    again.log(40, loss=0.5)
    again.close()
    assert steps(run_dir) == [10, 20, 30, 40]
    about = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    assert [about["config"]["from_resume"], about["earlier"][0]["config"]["from_resume"]] == ["auto", "0"]


def test_the_eta_is_right_after_resuming(run_dir, clock, capsys):
    """10 steps in 20 s after resuming at 900 of 1000: 90 steps are left at 2 s each. Dividing by all 910 steps, as
    trainers do that forget where they began, would promise 2 s."""
    logger = RunLogger.create(run_dir, Stage())
    logger.start(900, 1000)
    clock.seconds += 20
    logger.log(910, loss=1.0)
    assert "ETA 0:03:00" in capsys.readouterr().out
    clock.seconds += 180
    logger.log(1000, loss=1.0)
    assert "ETA" not in capsys.readouterr().out, "nothing is left"


def test_the_eta_forgets_a_slow_start(run_dir, clock, capsys):
    logger = RunLogger.create(run_dir, Stage())
    logger.start(0, 1000)
    clock.seconds += 600  # compiling
    for step in range(1, 101):
        clock.seconds += 1
        logger.log(step, loss=1.0)
    assert "ETA 0:15:00" in capsys.readouterr().out.splitlines()[-1], "900 steps at 1 s"


def test_the_end_says_what_the_run_took_over_all_its_starts(run_dir, clock, capsys):
    """40 minutes until it was killed after step 20, the last 10 of them after what was saved; then 20 minutes more. At
    6 an hour: (30 + 20) / 60 * 6 = 5. What the kill threw away has no record and is not in it."""
    logger = RunLogger.create(run_dir, Stage())
    logger.start(0, 40)
    for minutes, step in ((30, 10), (10, 20)):
        clock.seconds += 60 * minutes
        logger.log(step, loss=1.0)
    again = RunLogger.create(run_dir, Stage(from_resume="auto", price_per_hour=6))
    again.start(10, 40)
    clock.seconds += 20 * 60
    again.close(
        {"steps": 40, "tokens": 81920, "weights": "out/full_sft_32.pth", "val_loss": 1.25, "best_val_loss": 1.2}
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("done in 0:50:00, 40 steps, 81,920 trained tokens, val_loss 1.2500, best_val_loss 1.2000")
    assert line.endswith("cost 5.00: out/full_sft_32.pth")
    summary = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["summary"]
    assert summary["cost"] == 5.0 and summary["seconds"] == 3000 and summary["memory_gib"] > 0


def test_other_ranks_are_silent(run_dir, capsys):
    logger = RunLogger.create(run_dir, Stage(), enabled=False)
    logger.start(0, 10)
    logger.log(1, loss=1.0)
    logger.print("hello")
    logger.draw()
    logger.close({"loss": 1.0})
    assert not run_dir.exists() and capsys.readouterr() == ("", "")


# ---- failures ----


def train(run_dir, config) -> None:
    logger = RunLogger.create(run_dir, config)
    logger.start(0, 30)
    for step in (10, 20, 30):
        logger.log(step, loss=1.0)
    logger.draw()
    logger.close({"loss": 1.0})


def test_a_directory_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file where the directory should be", encoding="utf-8")
    train(tmp_path / "runs" / "x", Stage())
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 3
    warnings = [line.split(" is off")[0] for line in lines if line.startswith("warning: ")]
    assert warnings == ["warning: run.json", "warning: metrics.jsonl"], "each said once"


def test_a_disk_that_fills_up_stops_nothing(run_dir, capsys):
    def full(step, numbers):
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = RunLogger.create(run_dir, Stage())
    logger.start(0, 30)
    logger.log(10, loss=1.0)
    logger.sinks["metrics.jsonl"] = full
    logger.log(20, loss=1.0)
    logger.log(30, loss=1.0)
    text = capsys.readouterr().out
    assert text.count("warning: metrics.jsonl is off") == 1 and text.count("step ") == 3


def test_a_terminal_that_went_away_stops_nothing(run_dir, monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *words, **options: (_ for _ in ()).throw(BrokenPipeError))
    train(run_dir, Stage())
    assert steps(run_dir) == [10, 20, 30]


def test_without_wandb_the_run_says_how_to_get_it(run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    train(run_dir, Stage(use_wandb=True))
    assert capsys.readouterr().out.count("(pip install wandb)") == 1 and steps(run_dir) == [10, 20, 30]


class FakeRun:
    def __init__(self, fails_at: int):
        self.rows, self.finished, self.fails_at = [], False, fails_at

    def log(self, numbers, step):
        if step >= self.fails_at:
            raise ConnectionError("wandb.ai is unreachable")
        self.rows.append((step, numbers["loss"]))

    def finish(self):
        self.finished = True
        print("wandb: synced")


@pytest.mark.parametrize("fails_at, rows", [(99, [(10, 1.0), (20, 1.0), (30, 1.0)]), (20, [(10, 1.0)])])
def test_wandb_gets_the_same_numbers_until_it_fails(run_dir, monkeypatch, capsys, fails_at, rows):
    run, asked = FakeRun(fails_at), {}
    fake = types.SimpleNamespace(init=lambda **options: asked.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(run_dir, Stage(use_wandb=True, wandb_project="mine"))
    assert run.rows == rows and steps(run_dir) == [10, 20, 30]
    assert asked["project"] == "mine" and asked["id"] == "full_sft-1" and asked["config"]["batch_size"] == 32
    printed = capsys.readouterr().out
    assert printed.count("warning: wandb is off") == (fails_at == 20)
    assert printed.splitlines()[-1].startswith("done in"), "wandb's own lines come before ours"
    assert run.finished == (fails_at != 20), "what has failed is left alone"


@pytest.mark.soak
@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_a_tracker_works_offline(run_dir, monkeypatch, tracker):
    """The real one, with nobody to talk to; a resumed run goes on under the same name."""
    pytest.importorskip(tracker)
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir.mkdir(parents=True)
    for _ in range(2):
        train(run_dir, Stage(**{f"use_{tracker}": True}))
    written = list(run_dir.rglob(f"*.{tracker}"))
    patience = time.monotonic() + 30  # a process of wandb's own writes it, and on a busy machine it may come after us
    while not all(b"loss" in path.read_bytes() for path in written) and time.monotonic() < patience:
        time.sleep(0.1)
    assert len(written) == 2 and all(b"loss" in path.read_bytes() for path in written)
    assert steps(run_dir) == [10, 20, 30]


def test_tensorboard_gets_the_same_numbers(run_dir):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = RunLogger.create(run_dir, Stage(use_tensorboard=True), parameters=1234)
    logger.start(0, 20)
    logger.log(10, loss=2.5, lr=1e-3)
    logger.log(20, loss=1.5, lr=5e-4, val_loss=1.75)
    logger.close({"loss": 1.5})
    read = events.EventAccumulator(str(run_dir / "tensorboard"))
    read.Reload()
    points = {name: [(e.step, round(e.value, 6)) for e in read.Scalars(name)] for name in ("loss", "lr", "val_loss")}
    assert points == {"loss": [(10, 2.5), (20, 1.5)], "lr": [(10, 1e-3), (20, 5e-4)], "val_loss": [(20, 1.75)]}
    (config,) = read.Tensors("config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert "batch_size: 32" in text and "parameters: 1234" in text


@pytest.mark.parametrize("fails_at, rows", [(99, [(10, 1.0), (20, 1.0), (30, 1.0)]), (20, [(10, 1.0)])])
def test_swanlab_gets_the_same_numbers_until_it_fails(run_dir, monkeypatch, capsys, fails_at, rows):
    run, asked = FakeRun(fails_at), {}
    monkeypatch.setitem(sys.modules, "swanlab", types.SimpleNamespace(init=lambda **o: asked.update(o) or run))
    train(run_dir, Stage(use_swanlab=True, wandb_project="mine"))
    assert run.rows == rows and steps(run_dir) == [10, 20, 30]
    assert asked["project"] == "mine" and asked["name"] == "full_sft-1" and asked["config"]["batch_size"] == 32
    assert capsys.readouterr().out.count("warning: swanlab is off") == (fails_at == 20)


@pytest.mark.parametrize("tracker", ["tensorboard", "swanlab"])
def test_a_tracker_that_is_not_installed_says_how_to_get_it(run_dir, monkeypatch, capsys, tracker):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat", None)
    train(run_dir, Stage(**{f"use_{tracker}": True}))
    assert capsys.readouterr().out.count(f"(pip install {tracker})") == 1 and steps(run_dir) == [10, 20, 30]


def test_a_bar_that_cannot_be_drawn_stops_nothing(run_dir, monkeypatch):
    """The terminal was closed: drawing the bar's text raises, and training goes on."""

    def fail(*_, **__):
        raise OSError("closed")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = RunLogger.create(run_dir, Stage())
    logger.start(0, 10)
    monkeypatch.setattr(logger.bar, "refresh", fail)
    logger.advance(1)
    logger.log(2, loss=2.0)
    assert "progress bar" in logger.failed
    logger.close()


def test_on_a_terminal_there_is_a_bar_and_validation_stays_above_it(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = RunLogger.create(run_dir, Stage())
    logger.start(40, 100)
    logger.advance(41)  # steps that are not logged move it too, or a slow machine shows nothing for minutes
    logger.bar.refresh()
    logger.log(50, loss=2.0)
    logger.log(60, loss=2.0, val_loss=2.5)
    logger.print("saved")
    logger.close()
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()] == ["step 60/100", "saved"]
    assert "40/100 |" in err and "41/100 |" in err and "60/100 |" in err and "val_loss 2.5" in err


@pytest.mark.filterwarnings("error")
def test_a_picture_of_a_run_whose_steps_were_all_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "lr": 0.1, "grad_norm": 1.0}\n')
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


@pytest.mark.filterwarnings("error")
def test_a_run_may_have_a_chinese_name(tmp_path):
    (tmp_path / "医疗").mkdir()
    (tmp_path / "医疗/metrics.jsonl").write_text('{"step": 10, "loss": 0.1}\n')
    draw_losses(tmp_path / "医疗/metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()
