"""Adapters beside weights of 4 and 8 bits: in every stage, continued, talked to, merged; and without one, refused."""

import io
import math
from pathlib import Path

import pytest
import torch

import eval_model
from common.options import parse
from dataset.tiny_world import files as tiny_world
from evaluation.models import open_models
from model.adapter import load_adapter
from model.checkpoint import load_weights
from model.lora import adapted
from model.packed import dequantize, quantize
from model.quant import QuantLinear, quantized
from tests.helpers.compare import same
from tests.helpers.runs import FLAGS, run_script, run_stage, torchrun, train_twice
from tests.helpers.stages import prepare_stages, stage_flags
from trainer.loop.engine import Engine

STAGES = {  # script -> name of the adapter
    "pretrain": "pretrain",
    "full_sft": "full_sft",
    "lora": "lora_chats",
    "dpo": "rlhf",
    "distill_reason": "reason",
    "distillation": "full_dist",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepare_stages(tmp_path_factory.mktemp("world"))


@pytest.fixture
def trained(monkeypatch):
    """The models that were trained."""
    models, train = [], Engine.run
    monkeypatch.setattr(Engine, "run", lambda engine: models.append(engine.model) or train(engine))
    return models


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(60).view(2, 30)).logits


def loaded(out, name, *words):
    """The model that eval_model.py talks with, and what it says of it."""
    said = io.StringIO()
    words = [f"--lora_name={name}", f"--save_dir={out}", "--device=cpu", "--dtype=float32", *words]
    model, *_ = eval_model.load(parse(eval_model.EvalConfig, words), eval_model.Screen(io.StringIO(), said))
    return model, said.getvalue()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_beside_four_bits_and_talks_the_same(stage, world, tmp_path, trained):
    """Dropping the packed base's rounding errors afterwards would change what was learned with them."""
    run_stage(stage, *stage_flags(stage, world), f"--save_dir={tmp_path}", "--max_steps=3", "--use_lora", "--use_4bit")
    (model,) = trained
    assert len(quantized(model)) == len(adapted(model)) == 2 * 7
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".adapters." in name
    }
    name = STAGES[stage]
    adapter, base = load_adapter(tmp_path / f"lora/{name}_32.pth"), load_weights(world / "pretrain_32.pth")
    assert adapter.base == dict(path=str(base.path), hash=base.hash, bits=4)
    assert all(tensor.abs().max() > 0 for tensor in adapter.state.values()), "B began at 0"

    same_bits, said = loaded(tmp_path, name)
    assert "in 4 bits, as it was trained" in said and "; 4 bits and float32 on cpu" in said
    torch.testing.assert_close(logits(same_bits), logits(model), atol=0, rtol=0)
    if stage == "lora":
        dense, said = loaded(tmp_path, name, "--load_in_4bit=false")
        assert not quantized(dense) and f"{base.path}, though it was trained beside 4 bits: " in said
        assert not torch.equal(logits(dense), logits(model))
        eight, said = loaded(tmp_path, name, "--load_in_8bit")
        assert (
            f"{base.path} in 8 bits, though it was trained beside 4 bits: " in said
            and next(iter(quantized(eight).values())).bits == 8
        )


def test_the_packed_weights_are_those_of_the_file(world, tmp_path, trained, capsys):
    flags_of = stage_flags("lora", world)
    run_stage("lora", *flags_of, f"--save_dir={tmp_path}", "--max_steps=1", "--load_in_8bit", "--dtype=bfloat16")
    (model,), stored = trained, load_weights(world / "pretrain_32.pth").state
    for name, layer in quantized(model).items():
        weight = stored[f"{name}.weight"]
        assert torch.equal(layer.dequantize(), dequantize(quantize(weight, 8), weight.shape, torch.float32))
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    plain = load_weights(world / "pretrain_32.pth").build().num_parameters()
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".adapters." in name)
    said = capsys.readouterr().out
    assert f"model: {plain + adapters:,} parameters, {adapters:,} trained" in said
    assert "adapters beside 14 layers: all; the weights in 8 bits, " in said


def test_the_reference_of_dpo_is_the_packed_model_without_its_adapter(world, tmp_path):
    """B is 0 at first, so policy and reference are the same: every pair's loss is ln 2, to the last bit of a float."""
    words = [*stage_flags("dpo", world), f"--save_dir={tmp_path}", "--use_lora", "--load_in_4bit"]
    run_stage("dpo", *words, "--max_steps=1", "--log_interval=1", "--warmup_steps=0")
    loss = load_adapter(tmp_path / "lora/rlhf_32.pth").lineage[-1]["losses"]["loss"]
    assert loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("more", (["--load_in_4bit"], ["--load_in_8bit", "--activation_checkpointing"]))
def test_a_stopped_run_continues_bit_for_bit(more, world, tmp_path, stop_at):  # noqa: F811
    more = [*more, "--max_steps=8", "--save_interval=3", "--lora_dropout=0.3"]
    whole, parts = train_twice("lora", tmp_path, stop_at, [2, 5], *stage_flags("lora", world), *more)
    assert same(whole, parts) and all(".adapters.default." in name for name in whole)


def test_other_bits_do_not_continue_a_run(world, tmp_path):
    words = [*stage_flags("lora", world), f"--save_dir={tmp_path}", "--max_steps=4", "--save_interval=2"]
    run_stage("lora", *words, "--load_in_4bit")
    for other, bits in ((["--load_in_8bit"], 8), ([], "null")):
        with pytest.raises(ValueError, match=f"bits was 4, is {bits}\\."):
            run_stage("lora", *words, *other, "--from_resume=1")


def test_merged_weights_are_dequantised_ones_with_the_adapter_in_them(world, tmp_path):
    words = [*stage_flags("lora", world), f"--save_dir={tmp_path}", "--max_steps=3", "--load_in_4bit"]
    run_stage("lora", *words, "--merge_lora", "--save_peft")
    adapter, base = load_adapter(tmp_path / "lora/lora_chats_32.pth"), load_weights(world / "pretrain_32.pth")
    merged = load_weights(tmp_path / "lora_chats_merged_32.pth")
    for name, layer in quantized(base.build(torch.bfloat16, 4)).items():
        assert isinstance(layer, QuantLinear)
        added = adapter.settings.scale * (adapter.state[f"{name}.B"] @ adapter.state[f"{name}.A"])
        assert torch.equal(merged.state[f"{name}.weight"], (layer.dequantize() + added).bfloat16())
    assert merged.lineage == adapter.lineage
    model, said = loaded(tmp_path, "lora_chats", "--merge_lora")
    assert "merged" in said
    torch.testing.assert_close(logits(model), logits(merged.build()), atol=0.02, rtol=0.02)  # its embedding is in bf16
    assert load_adapter(tmp_path / "lora/lora_chats_32").base == adapter.base  # peft's directory knows the bits, too


def test_layers_without_an_adapter_are_unpacked_too(world, tmp_path):
    """The two recipes of other projects adapt the attention alone. A file with packed layers would be no weights."""
    words = [*stage_flags("lora", world), f"--save_dir={tmp_path}", "--max_steps=3", "--load_in_4bit"]
    run_stage("lora", *words, "--merge_lora", "--lora_targets=q_proj,v_proj")
    merged, base = load_weights(tmp_path / "lora_chats_merged_32.pth"), load_weights(world / "pretrain_32.pth")
    packed = base.build(torch.bfloat16, 4)
    for name, layer in quantized(packed).items():
        same_as_packed = torch.equal(merged.state[f"{name}.weight"], layer.dequantize(torch.bfloat16))
        assert same_as_packed == (not name.endswith(("q_proj", "v_proj"))), name
    model, _ = loaded(tmp_path, "lora_chats")
    torch.testing.assert_close(logits(model), logits(merged.build()), atol=0.02, rtol=0.02)


def test_converting_merges_into_the_weights_that_were_trained_beside(world, tmp_path):
    """As --merge_lora does. In our format the adapter still knows the bits."""
    words = [*stage_flags("lora", world), f"--save_dir={tmp_path}", "--max_steps=3", "--load_in_4bit"]
    run_stage("lora", *words, "--merge_lora", "--save_peft", "--learning_rate=0.1")
    expected, kept = load_weights(tmp_path / "lora_chats_merged_32.pth").state, load_weights(world / "pretrain_32.pth")
    for name in ("lora_chats_32.pth", "lora_chats_32"):
        out = tmp_path / f"{Path(name).suffix}_hf"
        words = [kept.path, out, "--to=hf", f"--lora_path={tmp_path / 'lora' / name}"]
        status, _, said = run_script("scripts/convert.py", *words)
        assert status == 0 and "unpacked from the 4 bits that it was trained beside" in said, said
        for layer, tensor in load_weights(out).state.items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[layer]), layer
    again = tmp_path / "again_32.pth"
    status, _, said = run_script("scripts/convert.py", tmp_path / "lora/lora_chats_32", again, "--to=pth")
    assert status == 0 and load_adapter(again).bits == 4, said


def test_comparing_says_that_the_base_is_kept_otherwise(world, tmp_path, capsys):
    words = [*stage_flags("lora", world), f"--save_dir={tmp_path}", "--max_steps=3", "--load_in_8bit"]
    run_stage("lora", *words)
    open_models([str(tmp_path / "lora/lora_chats_32.pth")], tmp_path, device="cpu")
    assert "pretrain_32.pth, though it was trained beside 8 bits: " in capsys.readouterr().err


def test_without_an_adapter_they_are_refused(world, tmp_path, capsys):
    for stage, words, message in (
        (
            "full_sft",
            ["--use_4bit"],
            "--load_in_4bit: weights of 4 bits cannot be trained, only an adapter beside them",
        ),
        ("dpo", ["--load_in_8bit=true"], "--load_in_8bit: weights of 8 bits cannot be trained"),
        ("lora", ["--load_in_4bit", "--load_in_8bit"], "kept in one of them; give one"),
    ):
        with pytest.raises((ValueError, SystemExit)) as error:
            run_stage(stage, *stage_flags(stage, world), f"--save_dir={tmp_path}", *words)
        assert message in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
def test_two_processes_train_the_same_adapter(world, tmp_path):
    words = [*stage_flags("lora", world)[:2], "--max_steps=3", "--load_in_4bit"]
    run_stage("lora", *words, "--batch_size=8", f"--save_dir={tmp_path / 'one'}")
    torchrun("trainer/train_lora.py", *FLAGS, *words, "--batch_size=4", f"--save_dir={tmp_path / 'two'}")
    one, two = (load_adapter(tmp_path / f"{name}/lora/lora_chats_32.pth") for name in ("one", "two"))
    for name, tensor in one.state.items():
        torch.testing.assert_close(two.state[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.soak
def test_learning_beside_packed_weights_ends_where_it_does_beside_dense_ones(tmp_path):
    """A model that has learned the tiny world, 100 steps of LoRA on its chats: the last losses are within 2 %."""
    data = tiny_world.generate(tmp_path / "data", files=("pretrain", "sft"))
    flags = [f"--save_dir={tmp_path}", "--dtype=bfloat16", "--max_seq_len=256", "--batch_size=8", "--log_interval=50"]
    shape = ["--hidden_size=128", "--num_hidden_layers=4", "--num_attention_heads=4", "--learning_rate=2e-3"]
    run_stage("pretrain", f"--data_path={data['pretrain']}", *flags, *shape, "--max_steps=300")
    losses = {}
    for bits in ("dense", "load_in_4bit", "load_in_8bit"):
        words = [f"--data_path={data['sft']}", f"--from_weight={tmp_path / 'pretrain_128.pth'}", *flags]
        words += ["--max_steps=100", "--use_lora", "--learning_rate=1e-3", f"--lora_name={bits}"]
        run_stage("full_sft", *words, *([] if bits == "dense" else [f"--{bits}"]))
        losses[bits] = load_adapter(tmp_path / f"lora/{bits}_128.pth").lineage[-1]["losses"]["loss"]
    print(losses)
    assert losses["dense"] < 3, "it has learned something"
    for bits in ("load_in_4bit", "load_in_8bit"):
        assert losses[bits] == pytest.approx(losses["dense"], rel=0.02), losses
