"""LoRA in every stage: it trains the adapter alone, says which weights it belongs to, continues, and loads again."""

import io

import pytest
import torch

import eval_model
from common.options import parse
from model.adapter import load_adapter
from model.checkpoint import load_weights
from tests.helpers.compare import same
from tests.helpers.runs import run_stage, train_twice
from tests.helpers.stages import prepare_stages, stage_flags
from trainer.loop.engine import Engine

STAGES = {  # script -> (name of the adapter, its entry in the lineage)
    "pretrain": ("pretrain", "pretrain"),
    "full_sft": ("full_sft", "full_sft"),
    "dpo": ("rlhf", "dpo"),
    "distill_reason": ("reason", "reason"),
    "distillation": ("full_dist", "distillation"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepare_stages(tmp_path_factory.mktemp("world"))


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(60).view(2, 30)).logits


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_an_adapter_that_talks_as_it_was_trained(stage, world, tmp_path, monkeypatch):
    trained, train = [], Engine.run
    monkeypatch.setattr(Engine, "run", lambda engine: trained.append(engine.model) or train(engine))
    before = (world / "pretrain_32.pth").read_bytes()
    run_stage(stage, *stage_flags(stage, world), f"--save_dir={tmp_path}", "--max_steps=3", "--use_lora", "--r=4")

    name, entry = STAGES[stage]
    (file,) = tmp_path.rglob("*.pth")
    assert file == tmp_path / "lora" / f"{name}_32.pth", "the adapter, and no other weights"
    assert (world / "pretrain_32.pth").read_bytes() == before
    adapter, base = load_adapter(file), load_weights(world / "pretrain_32.pth")
    assert adapter.base == dict(path=str(base.path), hash=base.hash) and adapter.settings.rank == 4
    assert [stage["stage"] for stage in adapter.lineage] == ["pretrain", entry]
    (model,) = trained
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".adapters." in n
    }
    assert all(tensor.abs().max() > 0 for tensor in adapter.state.values()), "B began at 0"

    words = [f"--lora_name={name}", f"--save_dir={tmp_path}", "--device=cpu", "--dtype=float32"]
    loaded, *_ = eval_model.load(parse(eval_model.EvalConfig, words), eval_model.Screen(io.StringIO(), io.StringIO()))
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)
    assert not torch.equal(logits(loaded), logits(base.build()))


@pytest.mark.parametrize("stage", ["pretrain", "distillation"])
def test_a_stopped_adapter_continues_bit_for_bit(stage, world, tmp_path, stop_at):  # noqa: F811
    more = ["--max_steps=8", "--save_interval=3", "--lora_rank=4", "--lora_dropout=0.3"]
    whole, parts = train_twice(stage, tmp_path, stop_at, [2, 5], *stage_flags(stage, world), *more)
    assert same(whole, parts) and all(".adapters.default." in name for name in whole)


def test_a_fresh_model_has_nothing_to_put_an_adapter_beside(world, tmp_path):
    data = f"--data_path={world / 'text.jsonl'}"
    with pytest.raises(ValueError, match="--use_lora: a fresh model has no weights to keep; .*--from_weight"):
        run_stage("pretrain", data, f"--save_dir={tmp_path}", "--use_lora")
