"""--health_prompts: figures about what the model says, beside the losses, that leave the training as it was."""

import json

import pytest
import torch

from common.options import parse
from inference.answers import answers
from inference.health import health
from model.checkpoint import load_weights
from tests.helpers.compare import same, state_of
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import jsonl, write_pretrain, write_sft
from tests.helpers.runs import run_stage, torchrun, train_twice
from trainer.loop.health import PROMPTS, TOKENS, HealthCheck
from trainer.run.resume import read_state
from trainer.stage import StageConfig

ASKED = [{"prompt": f"question {n}, 你好吗" * (1 + n % 3)} for n in range(PROMPTS + 4)]


@pytest.fixture
def flags(tmp_path):
    write_sft(tmp_path / "sft.jsonl")
    write_pretrain(tmp_path / "text.jsonl")
    jsonl(tmp_path / "asked.jsonl", *ASKED)
    run_stage("pretrain", f"--data_path={tmp_path / 'text.jsonl'}", f"--save_dir={tmp_path}", "--max_steps=2")
    data, start = f"--data_path={tmp_path / 'sft.jsonl'}", f"--from_weight={tmp_path / 'pretrain_32.pth'}"
    return [data, start, "--max_steps=8", "--batch_size=4", "--val_interval=4"]


def health_of(run):
    (metrics,) = run.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = {row["step"]: {k: v for k, v in row.items() if k.startswith("health_")} for row in rows}
    return {step: figures for step, figures in found.items() if figures}


def test_the_figures_are_those_of_the_model_at_that_step_and_the_weights_those_of_a_run_without(
    tmp_path, flags, capsys
):
    asked = f"--health_prompts={tmp_path / 'asked.jsonl'}"
    run_stage("full_sft", *flags, f"--save_dir={tmp_path / 'with'}", asked)
    assert "ended " in capsys.readouterr().out
    run_stage("full_sft", *flags, f"--save_dir={tmp_path / 'without'}")
    weights = tmp_path / "with/full_sft_32.pth"
    assert same(state_of(weights), state_of(tmp_path / "without/full_sft_32.pth"))
    found = health_of(tmp_path / "with")
    assert list(found) == [4, 8] and not health_of(tmp_path / "without")
    prompts = [row["prompt"] for row in ASKED[:PROMPTS]]
    said = answers(
        load_weights(weights).build().eval(),
        TOKENIZER,
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        max_new_tokens=TOKENS,
    )
    expected = health(said, prompts)
    assert found[8] == {f"health_{name}": value for name, value in expected.items() if name != "answers"}
    assert {"health_ended", "health_empty"} <= found[8].keys()


def test_a_stopped_run_with_it_continues_bit_for_bit_and_one_without_it_is_the_same(tmp_path, flags, stop_at):
    asked = f"--health_prompts={tmp_path / 'asked.jsonl'}"
    adapter = ("--use_lora", "--lora_dropout=0.5")  # which draws random numbers at every step
    whole, parts = train_twice("full_sft", tmp_path, stop_at, [3, 6], *flags, asked, *adapter)
    assert same(whole, parts)
    run_stage("full_sft", *flags, *adapter, f"--save_dir={tmp_path / 'without'}")
    (state,) = (tmp_path / "without").glob("resume/*/*/step_00000008")
    tensors, _ = read_state(state)
    assert same(whole, {**tensors["weights"], **tensors["optimizer"]})  # it has drawn no random number


def test_pretraining_continues_the_prompts(tmp_path):
    write_pretrain(tmp_path / "text.jsonl")
    (tmp_path / "asked.txt").write_text("once upon\nthe\n")
    data, asked = f"--data_path={tmp_path / 'text.jsonl'}", f"--health_prompts={tmp_path / 'asked.txt'}"
    run_stage("pretrain", data, asked, f"--save_dir={tmp_path}", "--max_steps=2", "--batch_size=4")
    model = load_weights(tmp_path / "pretrain_32.pth").build().eval()
    expected = health(answers(model, TOKENIZER, ["once upon", "the"], max_new_tokens=TOKENS), ["once upon", "the"])
    assert health_of(tmp_path)[2] == {f"health_{k}": value for k, value in expected.items() if k != "answers"}


def test_a_wrong_file_is_named_before_training(tmp_path, flags):
    from common.console import UserError

    (tmp_path / "bad.jsonl").write_text('{"ask": 1}\n')
    with pytest.raises(UserError, match="--health_prompts .*bad.jsonl:1: no question in this row"):
        run_stage("full_sft", *flags, f"--save_dir={tmp_path}", f"--health_prompts={tmp_path / 'bad.jsonl'}")


def test_a_model_that_computes_nan_has_no_figures_and_training_goes_on(tmp_path, capsys):
    """It ended the run, on the first rank only: the others waited for it."""
    jsonl(tmp_path / "asked.jsonl", *ASKED)
    check, model = HealthCheck(str(tmp_path / "asked.jsonl"), "chat", TOKENIZER, main=True), small_model()
    assert check(model)["health_empty"] >= 0 and model.training
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    assert check(model) == {} and model.training
    assert "--health_prompts: the model computes NaN" in capsys.readouterr().err


def test_answers_that_find_no_memory_do_not_end_the_training(tmp_path, capsys, monkeypatch):
    """They need a KV cache beside what the training keeps. The run ended before the save that was due then, and advised
    a smaller batch."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    jsonl(tmp_path / "asked.jsonl", *ASKED)
    check, model = HealthCheck(str(tmp_path / "asked.jsonl"), "chat", TOKENIZER, main=True), small_model()
    monkeypatch.setattr("trainer.loop.health.answers", full)
    assert check(model) == {} and model.training
    assert "--health_prompts: no memory is left for the answers" in capsys.readouterr().err
    monkeypatch.setattr("trainer.loop.health.answers", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check(model)


def test_sharded_weights_are_refused_by_name():
    config = StageConfig(health_prompts="a.jsonl", zero_stage=3, save_weight="x", backend="deepspeed")
    assert any(line.startswith("--health_prompts: with --zero_stage 3") for line in config.problems())
    assert parse(StageConfig, ["--save_weight=x", "--health_prompts=a.jsonl"]).health_prompts.endswith("/a.jsonl")


@pytest.mark.soak
@pytest.mark.parametrize("backend", [[], ["--backend=deepspeed", "--zero_stage=2"]])
def test_the_first_of_two_ranks_answers_and_the_other_waits(tmp_path, flags, backend):
    asked = f"--health_prompts={tmp_path / 'asked.jsonl'}"
    more = ["--device=cpu", "--dtype=float32", "--compile=off", "--max_seq_len=32", "--save_interval=0", *backend]
    torchrun("trainer/train_full_sft.py", *flags, *more, f"--save_dir={tmp_path / 'two'}", asked)
    assert list(health_of(tmp_path / "two")) == [4, 8]
