"""Is a run on track? Good runs are never doubted, and one that goes wrong is told early, once, with what differs."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest
from matplotlib.axes import Axes

from common.files import ROOT
from model.config import ModelConfig
from scripts.demo import COMMON, PRETRAIN, VOCABULARY
from tests.helpers.rows import jsonl, write_pretrain
from tests.helpers.runs import run_script, run_stage
from trainer import reference_curve
from trainer.losses.next_token import NextToken
from trainer.run import reference as module
from trainer.run.logger import NoLogger, RunLogger, read_metrics
from trainer.run.reference import CURVES, PATIENCE, Curve, Reference, find_reference, mean_loss, read_curve
from trainer.stage import StageConfig
from trainer.train_pretrain import PretrainConfig

FACTS = dict(
    stage="pretrain", tokenizer="t", data="d", architecture=dict(width=32), learning_rate=1e-3, dtype="float32"
)
STEADY = Curve("steady", FACTS, [0, 1, 2, 3, 4], [100, 200, 300, 400, 500, 600, 700], [3.8] * 7, [4.0] * 7, [4.1] * 7)


# ---- by hand ----


def test_a_window_that_is_partly_inside_counts_with_that_part():
    windows = [(0, 100, 6.0), (100, 200, 4.0), (200, 400, 3.0)]
    assert mean_loss(windows, 0, 100) == 6.0
    assert mean_loss(windows, 50, 200) == pytest.approx((50 * 6 + 100 * 4) / 150)
    assert mean_loss(windows, 150, 300) == pytest.approx((50 * 4 + 100 * 3) / 150)


def test_the_band_is_as_wide_again_as_the_runs_are_apart():
    """Five runs between 3.8 and 4.1, 0.3 apart: the band is 3.5 .. 4.4. Five runs that agree: 2 % of the loss."""
    assert STEADY.band(0, 100) == pytest.approx((3.5, 4.0, 4.4))
    same = dataclasses.replace(STEADY, low=STEADY.median, high=STEADY.median)
    assert same.band(100, 300) == pytest.approx((4.0 - 0.08, 4.0, 4.0 + 0.08))


def said_after(losses: list[float], every: int = 100, curve: Curve = STEADY) -> list[tuple[int, str]]:
    """Logs these mean losses, one every so many tokens -> [(tokens, the word after `is`)] of what was said."""
    reference, found = Reference(curve, FACTS), []
    for number, loss in enumerate(losses, 1):
        if text := reference.add(number * every, loss):
            found.append((number * every, text.partition(" tokens, is ")[2].split()[0]))
    return found


def test_outside_for_three_windows_is_said_once():
    assert PATIENCE == 3
    assert said_after([4.0, 4.3, 3.6, 4.1]) == []
    assert said_after([4.0, 5.0, 5.0, 4.0, 5.0, 5.0]) == [], "noise: it came back"
    assert said_after([4.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]) == [(400, "above")]
    assert said_after([3.0, 3.0, 3.0, 3.0]) == [(300, "below")]


def test_a_run_that_falls_too_fast_and_then_explodes_is_told_both():
    """So does a rate that is too high, while it warms up and after."""
    assert said_after([2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0]) == [(300, "below"), (600, "above")]


@pytest.mark.parametrize("every", [10, 25, 50, 100])
def test_how_often_a_run_logs_does_not_matter(every):
    """One step of 20 tokens can be far outside the band of windows of 100: means of a window are compared."""
    part = 100 // every
    noisy = [4.0 + (0.6 if number % 2 else -0.6) for number in range(7 * part)] if part > 1 else [4.0] * 7
    assert said_after(noisy, every) == []
    ((tokens, side),) = said_after([5.0] * 7 * part, every)
    assert (tokens, side) == (300, "above")


def test_a_run_that_logs_seldom_is_compared_with_all_of_what_it_logs():
    """In the first 200 tokens the loss falls from 8 to 4. Their mean, 6, is right, though far above the second 100."""
    falling = dataclasses.replace(STEADY, low=[8.0] + [4.0] * 6, median=[8.0] + [4.0] * 6, high=[8.0] + [4.0] * 6)
    assert said_after([6.0, 4.0, 4.0], every=200, curve=falling) == []
    assert said_after([6.0, 6.0, 6.0], every=200, curve=falling) == [(600, "above")]


def test_beyond_the_curve_and_without_a_loss_nothing_is_said():
    assert said_after([4.0] * 7 + [9.0] * 9) == []
    assert said_after([float("nan")] * 7) == [], "the watchdog speaks of those"


def test_the_warning_names_what_differs():
    ours = FACTS | dict(learning_rate=0.03, architecture=dict(width=64), tokenizer="u" * 40)
    reference = Reference(STEADY, ours)
    (text,) = filter(None, (reference.add(tokens, 7.0) for tokens in range(100, 600, 100)))
    assert text.startswith("warning: the loss, 7.000 after 300 tokens, is above the band of 5 reference runs (steady)")
    assert "3.500 to 4.400. Different in this run: another architecture, learning_rate 0.03 (there 0.001)" in text
    assert "another tokenizer" in text and "Usual causes: a learning rate that is too high" in text
    assert "\n" not in text


# ---- which runs a curve is for ----


def test_only_a_run_of_the_same_kind_finds_a_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CURVES", tmp_path)
    assert find_reference(None, FACTS) is None
    (tmp_path / "steady.json").write_text(STEADY.to_json(), encoding="utf-8")
    found = find_reference(None, FACTS)
    assert found is not None and found.curve == STEADY and found.differences == {}
    wrong = find_reference(None, FACTS | dict(learning_rate=0.03))
    assert wrong is not None and wrong.differences == {"learning_rate": (1e-3, 0.03)}, "what may be wrong is compared"
    for change in ("data", "tokenizer", "stage", "architecture", "parent"):
        assert find_reference(None, FACTS | {change: "other"}) is None, change


def test_a_curve_that_is_named_is_taken_if_its_losses_mean_the_same(tmp_path):
    path = tmp_path / "steady.json"
    path.write_text(STEADY.to_json(), encoding="utf-8")
    found = find_reference(str(path), FACTS | dict(data="e"))
    assert found is not None and found.differences == {"data": ("d", "e")}
    for name in ("tokenizer", "stage"):
        with pytest.raises(ValueError, match=f"--reference_curve .*steady.json: its runs have another {name}"):
            find_reference(str(path), FACTS | {name: "other"})


BROKEN = {
    "no JSON": "{",
    "a list": "[]",
    "a name too few": json.dumps({"name": "x"}),
    "a loss too few": STEADY.to_json().replace('"low": [3.8, ', '"low": ['),
    "not in order": STEADY.to_json().replace("[100, 200", "[200, 100"),
    "a text": STEADY.to_json().replace("[100, 200", '["100", 200'),
    "upside down": STEADY.to_json().replace('"low": [3.8', '"low": [4.8'),
    "infinite": STEADY.to_json().replace("4.1]", "Infinity]"),
    "no facts": STEADY.to_json().replace('"facts"', '"fact"'),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_no_curve_is_a_users_mistake(tmp_path, content, capsys):
    path = tmp_path / "curve.json"
    path.write_text(content, encoding="utf-8")
    assert content != STEADY.to_json()
    with pytest.raises(ValueError, match="curve.json: not a reference curve; trainer/reference_curve.py makes one"):
        read_curve(path)


def test_a_wrong_name_is_found_before_anything_is_read(tmp_path):
    (problem,) = PretrainConfig(reference_curve=str(tmp_path / "none.json")).problems()
    assert problem.startswith(f"--reference_curve: {tmp_path / 'none.json'}: no such file")


# ---- the log ----


def test_a_resumed_run_says_it_once_and_draws_the_band(tmp_path, capsys, monkeypatch):
    """100 tokens a step, logged every second step. Killed after step 6, resumed from 4, and it was said after 4. The
    band is drawn as far as the run has come. Other ranks say nothing."""
    config, run_dir, drawn = StageConfig(save_weight="x"), tmp_path / "runs" / "x-1", []
    monkeypatch.setattr(Axes, "fill_between", lambda self, *values, **options: drawn.append(values))
    for after, last in ((0, 4), (4, 6)):
        logger = RunLogger.create(run_dir, config, reference=Reference(STEADY, FACTS))
        logger.start(after, 8)
        for step in range(after + 2, last + 1, 2):
            logger.log(step, loss=7.0, tokens=100 * step)
            logger.log(step, val_loss=7.0)
        logger.draw()
        assert capsys.readouterr().out.count("warning:") == (after == 0)
        (at, low, high), (_, lower, upper) = drawn[-2:]
        assert list(at) == list(range(2, last + 1, 2))
        assert low == pytest.approx([3.5] * len(at)) and high == pytest.approx([4.4] * len(at))
        assert lower == pytest.approx([-12.5] * len(at)) and upper == pytest.approx([10.0] * len(at)), "percent of 4.0"
    others = RunLogger.create(run_dir, config, enabled=False, reference=Reference(STEADY, FACTS))
    assert type(others) is NoLogger and others.reference is None


def test_a_run_without_a_curve_has_no_band(tmp_path, monkeypatch):
    monkeypatch.setattr(Axes, "fill_between", lambda *a, **k: pytest.fail("there is nothing to draw"))
    logger = RunLogger.create(tmp_path / "x-1", StageConfig(save_weight="x"))
    logger.start(0, 1)
    logger.log(1, loss=7.0, tokens=100)
    logger.draw()
    assert (tmp_path / "x-1" / "loss.png").is_file()


# ---- real runs ----

STEPS = 48
FLAGS = [f"--max_steps={STEPS}", "--batch_size=4", "--epochs=9"]


def pretrain(folder, *flags):
    """A training of a tiny model -> its folder in runs/."""
    run_stage("pretrain", *FLAGS, f"--save_dir={folder}", *flags)
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A curve of five good runs, made by the script -> (its file, the text, the folders)."""
    folder = tmp_path_factory.mktemp("reference")
    data = write_pretrain(folder / "text.jsonl", rows=300)
    runs = [pretrain(folder / str(seed), f"--data_path={data}", f"--seed={seed}") for seed in range(5)]
    curve = folder / "curve.json"
    status, out, errors = run_script("trainer/reference_curve.py", *runs, f"--output={curve}")
    assert status == 0, errors
    assert out.count("beside the others: inside the band") == 5 and f"{curve}: 5 runs, {STEPS // 2} windows" in out
    return curve, data, runs


def test_good_runs_with_other_seeds_are_never_doubted(made, tmp_path, capsys):
    curve, data, runs = made
    for seed in (5, 6):
        pretrain(tmp_path / str(seed), f"--data_path={data}", f"--reference_curve={curve}", f"--seed={seed}")
        out = capsys.readouterr().out
        assert "on track? compared with 5 reference runs (curve)" in out and "warning: the loss" not in out, seed
    assert read_curve(curve).tokens[-1] == read_metrics(runs[0] / "metrics.jsonl")[-1]["tokens"]


def warned(out: str) -> tuple[int, str]:
    """(tokens, the whole warning); it has to be there exactly once for each side."""
    lines = [line for line in out.splitlines() if line.startswith("warning: the loss")]
    above = [line for line in lines if " is above " in line]
    assert len(above) == 1 and len(lines) <= 2, out
    return int(above[0].partition(" after ")[2].split()[0].replace(",", "")), above[0]


def test_a_rate_30_times_too_high_is_told_early(made, tmp_path, capsys):
    curve, data, _ = made
    pretrain(tmp_path, f"--data_path={data}", f"--reference_curve={curve}", "--learning_rate=0.3")
    tokens, text = warned(capsys.readouterr().out)
    assert tokens <= read_curve(curve).tokens[-1] / 2
    assert "learning_rate 0.3 (there 0.01)" in text and "steps" not in text.partition("Usual")[0].partition("Diff")[2]


def test_random_text_is_told_early(made, tmp_path, capsys):
    curve = made[0]
    dice = random.Random(0)
    rows = ({"text": "".join(chr(dice.randrange(0x4E00, 0x9000)) for _ in range(30))} for _ in range(300))
    data = jsonl(tmp_path / "noise.jsonl", *rows)
    pretrain(tmp_path / "out", f"--data_path={data}", f"--reference_curve={curve}")
    tokens, text = warned(capsys.readouterr().out)
    assert tokens <= read_curve(curve).tokens[-1] / 2 and "another data" in text


def test_shuffled_labels_are_told_early(made, tmp_path, capsys, monkeypatch):
    """A mistake in the code: the curve is found by what the run is made of, and nothing differs."""
    curve, data, _ = made
    call = NextToken.__call__

    def shuffled(self, model, batch):
        return call(self, model, dataclasses.replace(batch, targets=batch.targets.roll(1, 0).flip(1)))

    monkeypatch.setattr(NextToken, "__call__", shuffled)
    monkeypatch.setattr(module, "CURVES", curve.parent)
    pretrain(tmp_path, f"--data_path={data}")
    tokens, text = warned(capsys.readouterr().out)
    assert tokens <= read_curve(curve).tokens[-1] / 2 and "Different" not in text and "a change in the code" in text


def test_a_stopped_run_does_not_repeat_the_warning(made, tmp_path, capsys, stop_at):
    curve, data, _ = made
    flags = [f"--data_path={data}", f"--reference_curve={curve}", "--learning_rate=1e-5", "--from_resume=auto"]
    stop_at(STEPS // 2)
    with pytest.raises(SystemExit):
        pretrain(tmp_path, *flags)
    first, text = warned(capsys.readouterr().out)
    assert first <= read_curve(curve).tokens[-1] / 2 and "learning_rate 1e-05" in text
    stop_at(None)
    pretrain(tmp_path, *flags)
    out = capsys.readouterr().out
    assert "resumed after step" in out and "warning: the loss" not in out


# ---- the script ----


def refused(*words) -> str:
    with pytest.raises(ValueError) as caught:
        reference_curve.make_curve("x", [reference_curve.read_run(folder) for folder in words])
    return str(caught.value)


def changed(run, folder, **changes):
    """A copy of a run's folder with other entries in run.json."""
    folder.mkdir()
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    info["config"]["seed"] = 99
    info["facts"] |= changes
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    return folder


def test_runs_that_do_not_belong_together_are_refused(made, tmp_path):
    _, _, runs = made
    assert "both have seed 0" in refused(runs[0], runs[0])
    other = changed(runs[1], tmp_path / "rate", learning_rate=0.5)
    assert refused(runs[0], other).endswith("another learning_rate")
    assert "--val_path does not" in refused(runs[0], changed(runs[1], tmp_path / "data", data="x"))
    assert "no such file" in refused(tmp_path / "nothing")
    old = changed(runs[1], tmp_path / "old")
    (old / "run.json").write_text('{"config": {"seed": 1}}', encoding="utf-8")
    assert "does not say what the run was made of" in refused(old)
    for other in ("[]", '{"config": {"seed": 1}, "facts": []}'):
        (old / "run.json").write_text(other, encoding="utf-8")
        assert f"{old / 'run.json'}: cannot be read" in refused(runs[0], old)
    bad = changed(runs[1], tmp_path / "bad")
    (bad / "metrics.jsonl").write_text('{"step": 10, "tokens": 5, "loss": null}\n', encoding="utf-8")
    assert "not finite in step 10" in refused(bad)
    (problem,) = reference_curve.CurveConfig(runs=("a", "b", "c", "d")).problems()
    assert problem.startswith("--runs names 4: at least 5 folders in out/runs are needed")


def test_a_curve_is_the_lowest_median_and_highest_of_its_runs_as_far_as_all_have_come(made, tmp_path):
    """Worked out by hand: three runs, the second one stopped after 200 tokens, the third logging every 200."""
    _, _, runs = made
    logs = {1: [(100, 6.0), (200, 4.0), (300, 3.0)], 2: [(100, 5.0), (200, 4.5)], 3: [(200, 4.8), (400, 3.0)]}
    found = []
    for seed, rows in logs.items():
        folder = changed(runs[0], tmp_path / str(seed))
        jsonl(folder / "metrics.jsonl", *(dict(step=t // 10, tokens=t, loss=loss) for t, loss in rows))
        found.append(dataclasses.replace(reference_curve.read_run(folder), seed=seed))
    curve = reference_curve.make_curve("x", found)
    assert curve.tokens == [100, 200] and curve.seeds == [1, 2, 3]
    assert (curve.low, curve.median, curve.high) == ([4.8, 4.0], [5.0, 4.5], [6.0, 4.8])


# ---- those that come with Sparrow ----


def test_the_curves_that_come_with_sparrow_are_of_models_as_they_are_today():
    """A new architecture setting, another vocabulary or other flags of the demo, and nobody would be compared: then the
    curves have to be made again (docs/configuration.md)."""
    curves = {path.stem: read_curve(path) for path in CURVES.glob("*.json")}
    for name, vocabulary in dict(tiny_world_nano=VOCABULARY, pretrain_nano=6400).items():
        curve = curves[name]
        assert curve.name == name and len(curve.seeds) >= module.RUNS
        assert ModelConfig.preset("nano", vocab_size=vocabulary).to_dict() == curve.facts["architecture"]
    flags = dict(zip([*PRETRAIN, *COMMON][::2], [*PRETRAIN, *COMMON][1::2]))
    facts = curves["tiny_world_nano"].facts
    assert (facts["examples"], facts["max_seq_len"]) == (int(flags["--batch_size"]), int(flags["--max_seq_len"]))
    assert (facts["schedule"], facts["min_lr_ratio"]) == (flags["--schedule"], float(flags["--min_lr_ratio"]))
    assert facts["learning_rate"] == PretrainConfig().learning_rate


def test_curves_record_what_runs_record(made):
    """A fact that runs have and curves have not would keep every run from its curve."""
    info = json.loads((made[2][0] / "run.json").read_text(encoding="utf-8"))
    for path in CURVES.glob("*.json"):
        assert read_curve(path).facts.keys() == info["facts"].keys(), path.name


@pytest.mark.soak
def test_the_demos_pretraining_is_compared(tmp_path):
    """Its curve is found by the text of the tiny world and by the tokenizer: if either changes, make it again."""
    world, tokenizer = tmp_path / "world", tmp_path / "tokenizer"
    python = lambda *words: [sys.executable, *map(str, words)]
    subprocess.run(python("dataset/tiny_world", "--save_dir", world), cwd=ROOT, check=True)
    files = [world / f"{name}.jsonl" for name in ("pretrain", "sft")]
    words = ["--vocab_size", VOCABULARY, "--save_dir", tokenizer, "--data_path", *files]
    subprocess.run(python("trainer/train_tokenizer.py", *words), cwd=ROOT, check=True)
    words = ["--data_path", files[0], "--tokenizer_path", tokenizer, "--save_dir", tmp_path, *PRETRAIN, *COMMON]
    with subprocess.Popen(
        python("trainer/train_pretrain.py", *words), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(("on track?", "step ")):
                break
        process.kill()
    assert lines[-1].startswith("on track? compared with 5 reference runs (tiny_world_nano)"), "".join(lines)
