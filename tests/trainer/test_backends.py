"""One process, DistributedDataParallel and DeepSpeed's ZeRO 0-3 compute the same, and continue each other's runs; what
launchers say is translated, and what cannot be is refused by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.files import ROOT
from common.options import parse
from tests.helpers.backends_run import BACKENDS, SPLITS, WHOLE, measure, train
from tests.helpers.rows import write_pretrain, write_sft
from tests.helpers.runs import FLAGS, SHAPE, run_stage, sft_engine, torchrun
from trainer.loop.launch import deepspeed_config
from trainer.train_full_sft import SFTConfig

pytest.importorskip("deepspeed")
QUICK, ALL = ("ddp", "zero0", "zero1", "zero2", "zero3"), tuple(BACKENDS)


def compare(tmp_path: Path, steps: int, names) -> tuple[dict, list[dict]]:
    """What one process finds, and what each of two does."""
    write_sft(tmp_path / "sft.jsonl")
    one = measure(tmp_path, "one", torch.device("cpu"), steps, world=1)
    (tmp_path / "one.json").write_text(json.dumps(one["state"]))
    torchrun(ROOT / "tests" / "helpers" / "backends_run.py", tmp_path, steps, *names)
    return one, [torch.load(tmp_path / f"found{rank}.pth", weights_only=True) for rank in (0, 1)]


def check(tmp_path, steps, names):
    one, (two, other) = compare(tmp_path, steps, names)
    full = sum(tensor.nbytes for tensor in one["file"].values())
    for name in names:
        found = two[name]
        for split in SPLITS:  # the same gradient, however it is divided
            norm, bad, change = found["sgd"][split]
            norm_of_one, _, change_of_one = one["sgd"][split]
            assert not bad and norm == pytest.approx(norm_of_one, rel=1e-5), name
            for parameter, expected in change_of_one.items():
                error = (change[parameter] - expected).norm() / expected.norm()
                assert error < 1e-5, f"{name}, accumulation {split}, {parameter}: {error}"
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-5), name
        # the same file
        assert found["file"].keys() == one["file"].keys(), name
        for parameter, expected in one["file"].items():
            assert found["file"][parameter].dtype == torch.float32
            torch.testing.assert_close(found["file"][parameter], expected, atol=1e-3, rtol=1e-3)
        # stopped and resumed: bit for bit, and from what one process had saved
        losses, again = found["resumed"]
        assert found["resumed_equal"], f"{name}: {losses} {again}"
        assert found["from_one"] == pytest.approx(one["resumed"][0], abs=1e-5), name
        # fp32 moments are twice the weights; each rank has its half of what is sharded, and at most a little filling
        sharded = name not in ("ddp", "zero0")
        for moments, kept in (found["bytes"], other[name]["bytes"]):
            assert moments == pytest.approx(2 * full / (2 if sharded else 1), rel=0.02), name
            assert kept == pytest.approx(full / (2 if name in ("zero3", "offload3") else 1), rel=0.02), name
    check_muon(one, two, other)
    for name in names:  # and back: one process goes on where two were
        engine_losses = resume_alone(tmp_path, two[name]["state"])
        assert engine_losses == pytest.approx(one["resumed"][0], abs=1e-5), name


def check_muon(one, *ranks):
    """Two processes share the work of Muon: the update is that of one process, and a stop changes no bit. Its iteration
    in bf16 turns the last bits of a gradient into 1 % of an update, so the losses agree less well than AdamW's."""
    for found in (rank["ddp"] for rank in ranks):
        for ours, expected in zip(found["update"], one["update"]):
            assert torch.equal(ours, expected)
        losses, again, same = found["muon"]
        assert same, f"{losses} {again}"
        assert losses == pytest.approx(one["muon"][0], abs=1e-3)


def resume_alone(folder, state) -> list[float]:
    return train(sft_engine(folder, 8, 1, max_steps=WHOLE, from_resume=state, save_dir=folder / "alone"), WHOLE)


def test_every_backend_computes_the_same(tmp_path):
    check(tmp_path, 8, QUICK)


@pytest.mark.soak
def test_every_backend_computes_the_same_for_fifty_steps(tmp_path):
    check(tmp_path, 50, ALL)


# ---- memory


@pytest.mark.parametrize("experts", (0, 4))
def test_checkpointing_keeps_less_and_changes_no_bit(experts):
    """What autograd keeps, counted tensor by tensor: inside a block about twenty times its input, (B, T, d)."""
    from model.config import ModelConfig
    from model.transformer import CausalLM

    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
    model = CausalLM(ModelConfig(**shape, num_experts=experts))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(50, (2, 40))
    kept, gradients = {}, {}
    for recompute in (False, True):
        model.recompute, saved = recompute, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            out = model(tokens, targets=tokens)
        kept[recompute] = sum({t.untyped_storage().data_ptr(): t.nbytes for t in saved}.values())
        (out.loss.sum() + out.aux_loss.sum()).backward()
        gradients[recompute] = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    assert all(map(torch.equal, gradients[True], gradients[False]))
    assert kept[True] < kept[False] / 3


# ---- launchers


def launched(folder: Path, *command, timeout=400) -> str:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("stage", (2, 3))
def test_the_deepspeed_launcher_trains_what_one_process_does(tmp_path, stage):
    """`cd trainer && deepspeed --num_gpus 2 train_x.py`: pretraining, fine-tuning and an adapter, against python's."""
    write_pretrain(tmp_path / "text.jsonl")
    write_sft(tmp_path / "sft.jsonl")
    for name, data, output in (
        ("pretrain", "text", "pretrain_32.pth"),
        ("full_sft", "sft", "full_sft_32.pth"),
        ("lora", "sft", "lora/*_32.pth"),
    ):
        flags = [f"--data_path={tmp_path / data}.jsonl", "--max_steps=3", "--val_fraction=0.1"]
        run_stage(name, *flags, f"--save_dir={tmp_path / 'one'}", "--batch_size=8")
        (tmp_path / "two").mkdir(exist_ok=True)
        said = launched(
            ROOT / "trainer",
            "deepspeed",
            "--num_gpus=2",
            "--master_port=29617",
            f"train_{name}.py",
            *FLAGS,
            *(SHAPE if name == "pretrain" else []),
            *flags,
            f"--save_dir={tmp_path / 'two'}",
            "--batch_size=4",
            f"--zero_stage={stage}",
        )
        assert said.count("done in") == 1 and "backend=deepspeed" in said.replace("\n", " ")
        one, two = (tensors(next((tmp_path / folder).glob(output))) for folder in ("one", "two"))
        assert one.keys() == two.keys()
        for parameter in one:
            torch.testing.assert_close(two[parameter], one[parameter], atol=1e-4, rtol=1e-3)
        shutil.copytree(tmp_path / "one", tmp_path / "two", dirs_exist_ok=True)  # both go on from the same weights


def tensors(path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return next(v for v in content.values() if isinstance(v, dict) and any(map(torch.is_tensor, v.values())))


# ---- what launchers and files say, as options


def read(monkeypatch, *flags, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return parse(SFTConfig, list(flags))


def refused(monkeypatch, capsys, *flags, **environment) -> str:
    with pytest.raises(SystemExit) as end:
        read(monkeypatch, *flags, **environment)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_how_a_script_was_started_decides_the_backend(monkeypatch):
    assert read(monkeypatch).backend == "auto"
    deepspeed = read(monkeypatch, "--local_rank=1")
    assert (deepspeed.backend, deepspeed.zero_stage) == ("deepspeed", 2)
    assert read(monkeypatch, "--local_rank=1", "--backend=ddp").backend == "ddp"
    assert read(monkeypatch, CROSS_SIZE="1").backend == "deepspeed"  # deepspeed --no_local_rank
    assert read(monkeypatch, "--local_rank=0", TORCHELASTIC_RUN_ID="x").backend == "auto"
    three = read(monkeypatch, "--zero_stage=3")
    assert (three.backend, three.zero_stage, three.compile) == ("deepspeed", 3, "off")


def test_accelerates_choices_are_ours(monkeypatch, capsys, tmp_path):
    assert read(monkeypatch, ACCELERATE_MIXED_PRECISION="bf16").dtype == "bfloat16"
    assert read(monkeypatch, "--dtype=float32").dtype == "float32"  # what is typed wins
    assert read(monkeypatch, ACCELERATE_MIXED_PRECISION="no").dtype == "float32"
    assert "--mixed_precision fp8 is not supported" in refused(monkeypatch, capsys, ACCELERATE_MIXED_PRECISION="fp8")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "ZeRO-3 shards the same" in refused(monkeypatch, capsys, ACCELERATE_USE_FSDP="true")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    theirs = dict(
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_ZERO_STAGE="3",
        ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu",
        TORCHELASTIC_RUN_ID="x",
    )
    config = read(monkeypatch, **theirs)
    assert (config.backend, config.zero_stage, config.zero_offload) == ("deepspeed", 3, "optimizer")


def test_a_deepspeed_file_is_merged(monkeypatch, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "gradient_clipping": 0.5,
                "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
                "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": False},
            }
        )
    )
    config = read(
        monkeypatch,
        f"--deepspeed_config={path}",
        "--grad_clip=0.5",
        "--batch_size=4",
        "--accumulation_steps=3",
        "--zero_offload=optimizer",
    )
    assert (config.backend, config.zero_stage) == ("deepspeed", 1)
    merged = deepspeed_config(config, world=2)
    assert merged["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu"},
        "reduce_bucket_size": 20_000_000,
    }
    assert "optimizer" not in merged and merged["gradient_clipping"] == 0.5
    assert merged["train_batch_size"] == 8 and merged["gradient_accumulation_steps"] == 1  # we say which is the last


def test_contradictions_are_named(monkeypatch, capsys, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "train_batch_size": 7,
                "gradient_clipping": 2.0,
                "zero_optimization": {"stage": 3},
                "optimizer": {"type": "Lamb", "params": {"lr": 3e-4}},
                "scheduler": {"params": {"warmup_num_steps": 10}},
                "fp16": {"enabled": True},
                "bf16": {"enabled": True},
            }
        )
    )
    said = refused(
        monkeypatch,
        capsys,
        f"--deepspeed_config={path}",
        "--zero_stage=1",
        "--optimizer=muon",
        "--dtype=float32",
        "--zero_offload=parameters",
    )
    for part in (
        "train_batch_size 7 contradicts --batch_size x --accumulation_steps x processes 16",
        "gradient_clipping 2.0 contradicts --grad_clip 1.0",
        "zero_optimization.stage 3 contradicts --zero_stage 1",
        "optimizer.params.lr 0.0003 contradicts --learning_rate 5e-05",
        "optimizer.type Lamb",
        "scheduler: the rate follows --schedule",
        "fp16.enabled",
        "bf16.enabled contradicts --dtype float32",
        "--optimizer muon: needs whole matrices",
        "--zero_offload parameters: needs --zero_stage 3, not 1",
    ):
        assert part in said, said
    path.write_text('{"a": 1,\n oops}')
    assert "ds.json:2: not JSON" in refused(monkeypatch, capsys, f"--deepspeed_config={path}")
    said = refused(monkeypatch, capsys, "--zero_stage=1", "--backend=ddp")
    assert "--zero_stage 1: is for --backend deepspeed" in said
