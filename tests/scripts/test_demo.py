"""What the demo shows while it runs, what it does not train again, and its last step."""

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.files import ROOT
from model.adapter import save_adapter
from model.checkpoint import load_weights, save_weights
from model.lora import LoRASettings, add_lora
from scripts import demo, demo_progress
from scripts.commands import call
from scripts.demo import Demo, DemoConfig, Stage, report
from scripts.demo_progress import Forecast, Watch
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import write_dpo, write_pretrain
from tests.helpers.runs import run_script
from trainer.loop.engine import Engine


def test_the_rest_takes_as_much_longer_as_what_is_over():
    """Here everything takes twice as long: 100 s in place of 50, then 30 s for half of a part of 30."""
    forecast = Forecast({"one": 50, "two": 30, "three": 40, "four": 60})
    forecast.finish("one", 100)
    forecast.leave_out("four")
    assert forecast.later("two", taken=30, share=0.5) == pytest.approx(2 * 40)
    forecast.finish("two", 60)
    assert forecast.later("three", taken=20, share=0.25) == 0


def test_a_training_that_goes_on_counts_for_what_it_does_here():
    """Half of its steps were done by an earlier start: 15 s of the other half's 30 are as fast as the first machine."""
    forecast = Forecast({"one": 60, "two": 40})
    forecast.finish("one", 30, share=0.5)
    assert forecast.later("two", taken=10, share=0.25) == 0
    assert (forecast.known, forecast.taken) == (30, 30)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [0.0]
    monkeypatch.setattr(demo_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then_says_how_far_it_is(clock, capsys):
    """10 s of start-up, then 0.5 s a step. After 30 s, 40 steps are done and 160 are left: 80 s. A fifth of the
    training took 30 s, and the exam takes a fifth of it."""
    watch = Watch(Forecast({"pretrain": 100, "exam": 20}), "pretrain")
    for step in (1, *range(20, 201, 20)):
        clock[0] = 10 + step / 2
        watch.line(f"step {step}/200  loss 2.5000  lr 1.00e-03  ETA 0:00:10")
    watch.line("config (* = not the default): many lines")
    watch.line("warning: something is odd")
    watch.close()
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    assert first == "step 40/200  loss 2.5000, 0:01:20 left of this stage, 0:01:50 of everything"
    assert second.startswith("step 100/200  loss 2.5000, 0:00:50 left of this stage, 0:01:14 ")
    assert third.startswith("step 160/200") and rest == ["warning: something is odd"]
    assert watch.forecast.known == 100 and watch.forecast.taken == 110


def test_a_resumed_training_is_no_faster_than_it_is(clock):
    watch = Watch(Forecast({"pretrain": 100, "exam": 20}), "pretrain")
    watch.line("resumed after step 100 of 200 from somewhere")
    clock[0] = 60
    watch.line("step 200/200  loss 1.0")
    watch.close()
    assert (watch.forecast.known, watch.forecast.taken) == (50, 60)


def test_a_stage_that_fails_shows_its_last_lines(tmp_path, capsys):
    (tmp_path / "fails.py").write_text("import sys; print('read'); print('broken', file=sys.stderr); sys.exit(3)")
    watch = Watch(Forecast({"one": 1}), "one")
    with pytest.raises(SystemExit) as end:
        call([tmp_path / "fails.py"], watch.line, with_stderr=True)
    assert end.value.code == 3 and capsys.readouterr().out == ""
    watch.fail(128 + signal.SIGTERM)
    assert capsys.readouterr().out.splitlines() == ["broken"]
    watch.fail(3)
    assert capsys.readouterr().out.splitlines() == ["its last lines:", "read", "broken"]


@pytest.fixture
def stage(tmp_path, monkeypatch, capsys):
    """Trains the demo's first stage, on some rows, in this process -> what the demo says."""
    (tmp_path / "tiny_world").mkdir()
    write_pretrain(tmp_path / "tiny_world/pretrain.jsonl")
    (tmp_path / "tokenizer").symlink_to(Path(TOKENIZER.path).resolve())
    flags = "--preset nano --num_hidden_layers 1 --max_steps 4 --max_seq_len 32 --batch_size 2 --device cpu".split()
    pretraining = Stage("pretrain", "Pretraining", "train_pretrain", "pretrain", flags, ())

    def in_this_process(words, line, **_):
        monkeypatch.setattr(sys, "argv", list(words))
        module = importlib.import_module(Path(words[0]).with_suffix("").as_posix().replace("/", "."))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            module.main()
        for text in out.getvalue().splitlines():
            line(text)

    monkeypatch.setattr(demo, "call", in_this_process)

    def train(**changes) -> str:
        capsys.readouterr()
        Demo(DemoConfig(save_dir=str(tmp_path), **changes)).train_stage(pretraining)
        return capsys.readouterr().out

    return train


def test_only_what_has_changed_is_trained_again(stage, tmp_path, monkeypatch):
    weights = f"{tmp_path}/pretrain_192.pth"
    assert "done in" in stage()
    assert stage().splitlines()[-1] == f"up to date: {weights}"
    assert "done in" in stage(fresh=True)

    write_pretrain(tmp_path / "tiny_world/pretrain.jsonl", rows=41)
    out = stage()
    assert f"what has changed since: data {tmp_path}/tiny_world/pretrain.jsonl\n" in out and "done in" in out
    assert stage().splitlines()[-1] == f"up to date: {weights}"

    monkeypatch.setattr(demo, "call", lambda *_, **__: None)  # from here on, what it says is enough
    monkeypatch.setattr(demo, "COMMON", [*demo.COMMON, "--seed", "7"])
    assert "changed since: the command\n" in stage()
    monkeypatch.setattr("evaluation.lineage.code_version", lambda: "newer")
    assert "changed since: the command, the code\n" in stage()


def test_an_interrupted_training_goes_on_where_it_was(stage, tmp_path, monkeypatch):
    step = Engine.train_step

    def interrupted(self, batches):
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", interrupted)
        with pytest.raises(SystemExit):
            stage()
    status, out, _ = run_script("scripts/lineage.py", tmp_path / "pretrain_192.pth")
    assert status == 0 and "3 of 4 steps" in out
    out = stage()
    assert "--from_resume auto" in out and "done in" in out
    states = sorted((tmp_path / "resume/pretrain_192").glob("*/step_*"))
    assert [state.name for state in states] == ["step_00000004"]  # of one run: it was continued, not begun again
    assert "up to date" in stage()


@pytest.mark.soak
def test_every_part_runs_and_the_second_time_none(tmp_path):
    command = [sys.executable, "scripts/demo.py", "--quick", "--save_dir", str(tmp_path)]
    first, second = (subprocess.run(command, capture_output=True, text=True, encoding="utf-8") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr + second.stdout + second.stderr
    assert first.stdout.count("done in") == 5 and "up to date" not in first.stdout
    assert second.stdout.count("up to date") == 6 and "done in" not in second.stdout
    assert "Everything runs" in second.stdout and "Who are you?" not in second.stdout  # six steps teach nothing


def test_a_quick_demo_leaves_the_trained_models_alone():
    """It used to write into out/ too, where it replaced what 13 minutes had trained."""
    assert DemoConfig(quick=True).save_dir == str(ROOT / "out/quick")
    assert DemoConfig().save_dir == str(ROOT / "out")
    assert DemoConfig(quick=True, save_dir="elsewhere").save_dir == "elsewhere"


def test_flags_of_which_one_undoes_the_other_are_refused():
    """--skip_training --quick did nothing, and said that everything runs; --fresh was ignored."""
    about = lambda **flags: [line.partition(":")[0] for line in DemoConfig(skip_training=True, **flags).problems()]
    assert about() == [] and about(fresh=True) == ["--skip_training and --fresh"]
    assert about(quick=True, question_seed=1) == ["--skip_training and --quick", "--question_seed"]


def test_the_demo_ends_with_a_report(tmp_path: Path):
    recorded = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
    stages = [dict(stage="pretrain"), dict(stage="full_sft")]
    save_weights(tmp_path / "full_sft_32.pth", small_model(), tokenizer=recorded, lineage=stages)
    save_weights(tmp_path / "rlhf_32.pth", small_model(0.07), tokenizer=recorded, lineage=[*stages, dict(stage="dpo")])
    base = load_weights(tmp_path / "full_sft_32.pth")
    model, settings = base.build(), LoRASettings(rank=1)
    torch.manual_seed(0)
    add_lora(model, settings)
    parent = dict(path=str(base.path), hash=base.hash)
    path = tmp_path / "lora/lora_identity_32.pth"
    save_adapter(path, model, settings, base=parent, tokenizer=recorded, lineage=stages)
    (tmp_path / "tiny_world").mkdir()
    write_dpo(tmp_path / "tiny_world/dpo_val.jsonl", 4)

    page = report(["full_sft", "lora_identity", "rlhf"], DemoConfig(save_dir=str(tmp_path)))
    assert page.is_file() and page.suffix == ".html"
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert [model["name"] for model in found["models"]] == ["full_sft_32", "lora_identity_32", "rlhf_32"]
    assert {"fact", "identity", "manner"} <= {row["kind"] for row in found["questions"]}
    assert len(found["questions"]) > 30 and found["held_out"][0]["file"] == "dpo_val.jsonl"
    # B of a fresh adapter is zero: whatever it is asked, it answers as its base does
    assert all(row["answers"][0] == row["answers"][1] for row in found["questions"])
