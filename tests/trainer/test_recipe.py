"""--recipe: which one a run has, what it sets and leaves alone, and that a continued run keeps its own."""

import pytest

from common.options import describe, parse
from tests.helpers.rows import write_pretrain
from tests.helpers.runs import FLAGS, run_stage
from trainer.stage import StageConfig
from trainer.train_distill_reason import ReasonConfig
from trainer.train_distillation import DistillationConfig
from trainer.train_dpo import DPOConfig
from trainer.train_full_sft import SFTConfig
from trainer.train_lora import LoRAConfig
from trainer.train_pretrain import PretrainConfig

TEACHER = ["--teacher=full_sft"]


def chosen(config) -> tuple:
    return config.recipe, config.optimizer, config.schedule, config.learning_rate


@pytest.mark.parametrize(
    "stage, rate, flags",
    [
        (PretrainConfig, 5e-4, []),
        (SFTConfig, 5e-5, []),
        (DPOConfig, 5e-6, []),
        (LoRAConfig, 1e-3, []),
        (ReasonConfig, 1e-4, []),
        (DistillationConfig, 5e-4, TEACHER),
    ],
)
def test_classic_is_what_there_was_before_recipes(stage, rate, flags):
    assert chosen(parse(stage, ["--recipe=classic", *flags])) == ("classic", "adamw", "cosine", rate)


def test_which_recipe_a_run_has():
    recipe = lambda stage, *flags: parse(stage, list(flags)).recipe
    assert recipe(PretrainConfig) == recipe(PretrainConfig, "--optimizer=muon") == "modern"
    assert recipe(PretrainConfig, "--lora_rank=0") == recipe(SFTConfig, "--recipe=modern") == "modern"
    for flag in ("--optimizer=adamw", "--use_lora", "--lora_rank=4", "--zero_stage=2", "--backend=deepspeed"):
        assert recipe(PretrainConfig, flag) == "classic", flag
    for stage in (SFTConfig, DPOConfig, LoRAConfig, ReasonConfig):
        assert recipe(stage) == "classic"
    assert recipe(SFTConfig, "--use_lora", "--recipe=modern") == "modern", "what is asked for is done"


def test_the_deepspeed_launcher_means_classic(monkeypatch):
    monkeypatch.setenv("CROSS_SIZE", "2")
    assert chosen(parse(PretrainConfig, [])) == chosen(parse(PretrainConfig, ["--recipe=classic"]))


def test_what_is_given_wins(tmp_path):
    config = parse(PretrainConfig, ["--learning_rate=3e-4", "--schedule=cosine"])
    assert (config.recipe, config.optimizer, config.schedule, config.learning_rate) == (
        "modern",
        "muon",
        "cosine",
        3e-4,
    )
    assert "*learning_rate=0.0003" in describe(config) and " optimizer=muon" in describe(config)
    file = tmp_path / "mine.yaml"
    file.write_text("training:\n  recipe: classic\n  schedule: constant\n", encoding="utf-8")
    config = parse(PretrainConfig, ["--config", str(file)])
    assert chosen(config) == ("classic", "adamw", "constant", 5e-4) and "*recipe=classic" in describe(config)
    assert chosen(parse(PretrainConfig, ["--config", str(file), "--recipe=modern"]))[:2] == ("modern", "muon")
    equal_to_the_default = parse(PretrainConfig, ["--learning_rate=2e-3"]).with_recipe("classic")
    assert equal_to_the_default.learning_rate == 2e-3 and equal_to_the_default.optimizer == "adamw"


def test_a_wider_model_has_a_lower_rate():
    """2e-3 was best for nano (192 wide), and too high for base (768): twice as wide twice, so half of the rate."""
    rate = lambda width, *flags, stage=PretrainConfig: parse(stage, list(flags)).for_width(width).learning_rate
    assert [rate(width) for width in (64, 192, 512, 768)] == [2e-3, 2e-3, 1.2e-3, 1e-3]
    assert rate(768, "--recipe=modern", stage=SFTConfig) == 2.5e-4
    assert rate(768, "--learning_rate=2e-3") == 2e-3, "what is given wins"
    assert rate(768, "--recipe=classic") == 5e-4
    again = parse(PretrainConfig, []).for_width(768).with_recipe("classic")
    assert again.learning_rate == 5e-4, "it still counts as left open"


def test_recipes_that_cannot_be(capsys):
    for stage, flags, said in (
        (DPOConfig, ["--recipe=modern"], "--recipe modern: this stage has only classic; leave it out"),
        (SFTConfig, ["--recipe=modern", "--zero_stage=2"], "--optimizer muon: needs whole matrices"),
        (SFTConfig, ["--recipe=best"], "--recipe best: choose from modern, classic"),
    ):
        with pytest.raises(SystemExit):
            parse(stage, flags)
        assert said in capsys.readouterr().err


@pytest.fixture
def pretrain(tmp_path, capsys, monkeypatch):
    """Pretraining without the tests' usual recipe and rate -> what it printed."""
    write_pretrain(tmp_path / "data.jsonl")
    kept = [flag for flag in FLAGS if not flag.startswith(("--recipe", "--learning_rate"))]
    monkeypatch.setattr("tests.helpers.runs.FLAGS", kept)

    def run(*flags) -> str:
        run_stage("pretrain", f"--data_path={tmp_path / 'data.jsonl'}", f"--save_dir={tmp_path}", *flags)
        return capsys.readouterr().out

    return run


def test_a_continued_run_keeps_its_recipe(pretrain, monkeypatch):
    """States from before there were recipes do not name one. They were classic, and go on so under today's default."""
    whole = StageConfig.as_dict
    without = lambda config: {name: value for name, value in whole(config).items() if name != "recipe"}
    with monkeypatch.context() as before:
        before.setattr(StageConfig, "as_dict", without)
        pretrain("--recipe=classic", "--max_steps=2")
    said = pretrain("--max_steps=4", "--from_resume=auto")
    assert "recipe=classic" in said and "resumed after step 2 of 4" in said
    assert "changed since then: max_steps 2 -> 4\n" in said
    assert "recipe=classic" in pretrain("--max_steps=6", "--from_resume=auto"), "the state names it by now"
    with pytest.raises(ValueError, match='optimizer was "adamw", is "muon"'):
        pretrain("--max_steps=6", "--from_resume=auto", "--recipe=modern")


def test_a_finished_run_says_that_no_step_is_left(pretrain):
    """It listed what may change on resume, and was `done` at once. And what had no value was called None."""
    pretrain("--max_steps=2", "--save_minutes=5")
    said = pretrain("--max_steps=2", "--from_resume=auto")
    assert (
        "resumed after step 2 of 2" in said and "; no step is left; to train on, ask for more with --epochs or" in said
    )
    assert "changed since then: save_minutes 5 -> none\n" in said and "may change" not in said


def test_a_run_takes_the_rate_of_its_width(pretrain):
    said = pretrain("--recipe=modern", "--hidden_size=768", "--num_hidden_layers=1", "--max_steps=1")
    assert "*learning_rate=0.001" in said.split(), "2e-3 is the default, of narrow models"


def test_an_optimiser_of_ones_own_has_to_be_given_again(pretrain):
    pretrain("--recipe=classic", "--optimizer=muon", "--max_steps=2")
    with pytest.raises(ValueError, match="was started with --optimizer muon; give it again"):
        pretrain("--max_steps=4", "--from_resume=auto")
    said = pretrain("--max_steps=4", "--from_resume=auto", "--optimizer=muon")
    assert "resumed after step 2 of 4" in said and "schedule=cosine" in said
