"""Training with --compile on follows the same losses as without, in every stage, with experts, in every precision.

The quick tests leave out the code generator ("aot_eager"), which needs a C++ compiler and half a minute a stage. What
ended runs with a traceback (an operator whose shape function refuses fp32) comes before it. `make soak` has it all.
"""

import functools
import json
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.files import ROOT
from model.checkpoint import save_weights
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.rows import write_dpo, write_pretrain, write_reason, write_sft
from tests.helpers.runs import FLAGS, SHAPE, run_stage, torchrun
from trainer.loop import compiling

STAGES = {  # stage, its rows, experts of the weights it starts from, further flags
    "moe in fp32": ("pretrain", write_pretrain, None, ["--use_moe"]),
    "moe in bf16": ("pretrain", write_pretrain, None, ["--use_moe", "--dtype=bfloat16"]),
    "moe, recomputed": ("full_sft", write_sft, 4, ["--gradient_checkpointing=1"]),
    "preferences": ("dpo", write_dpo, 4, []),
    "reasoning": ("distill_reason", write_reason, 0, []),
    "distillation": ("distillation", write_sft, 0, ["--teacher={weights}", "--alpha=0.5"]),
    "head in chunks": ("full_sft", write_sft, 0, []),
}
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.soak, pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")],
    ),
]


def arguments(folder, write, experts, more):
    flags = [f"--data_path={write(folder / 'data.jsonl', 12)}", "--max_steps=3", "--batch_size=4", "--log_interval=1"]
    if experts is not None:
        about = dict(path=TOKENIZER.path, hash=TOKENIZER.hash)
        weights = save_weights(folder / "start.pth", small_model(num_experts=experts), tokenizer=about, lineage=[])
        more = [f"--from_weight={weights}", *(flag.format(weights=weights) for flag in more)]
    return [*flags, *more]


def losses(folder) -> list[float]:
    (log,) = folder.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STAGES)
def test_compiled_follows_the_same_losses(name, backend, tmp_path, monkeypatch):
    stage, write, experts, more = STAGES[name]
    if "chunks" in name:
        monkeypatch.setattr("model.transformer.LOGITS_AT_ONCE", 1)
    flags = arguments(tmp_path, write, experts, more)
    run_stage(stage, *flags, f"--save_dir={tmp_path / 'eager'}")
    if backend != "inductor":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        monkeypatch.setattr(compiling, "can_compile", lambda _: True)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run_stage(stage, *flags, f"--save_dir={tmp_path / 'compiled'}", "--compile=on")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"], "a block is one graph"
    eager, compiled = (losses(tmp_path / folder) for folder in ("eager", "compiled"))
    assert len(eager) == 3 and compiled == pytest.approx(eager, rel=0.02 if "bf16" in name else 1e-3)


@pytest.mark.skipif(not compiling.can_compile("cpu"), reason="no C++ compiler here")
def test_a_compiler_that_cannot_compile_is_none(tmp_path, monkeypatch):
    """A g++ without its parts, in a slim image: `--compile auto` ended the run with "No working C++ compiler"."""
    for name in ("g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compiling.can_compile("cpu")


def test_windows_needs_microsofts_compiler(tmp_path, monkeypatch):
    """torch takes no other. With a g++ that came with something else, `--compile auto` ended the run."""
    for name in ("g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name if (tmp_path / name).exists() else None)
    assert not compiling.can_compile("cpu")
    (tmp_path / "cl").touch()
    assert compiling.can_compile("cpu")


def test_macos_needs_openmp(tmp_path, monkeypatch):
    """Apple's clang has none, and torch's compiler asks for it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(compiling, "compiles", lambda *_: True)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "Python.h")
    assert not compiling.can_compile("cpu")
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    assert compiling.can_compile("cpu")


def test_torch_does_not_recommend_what_is_not_used(monkeypatch):
    """Its compiler warns on a T4 or 3060 in each run that max_autotune will not do there, and in fp32 of TF32."""
    monkeypatch.setattr(compiling, "can_compile", lambda _: True)
    log, head = logging.getLogger("torch._inductor.utils"), lambda x: x
    model = SimpleNamespace(model=SimpleNamespace(layers=[]), token_loss=head, cross_entropy=head)
    loader = SimpleNamespace(packing=True, limit_shapes=int)
    warning = lambda text: log.makeRecord(log.name, logging.WARNING, __file__, 1, text, (), None)
    with warnings.catch_warnings(record=True) as heard:
        compiling.compile_model(model, SimpleNamespace(compile="on"), torch.device("cpu"), loader, 1)
        for text in ("TensorFloat32 tensor cores for float32 matrix multiplication available", "another"):
            warnings.warn(text, stacklevel=1)
    assert [str(one.message) for one in heard if one.category is UserWarning] == ["another"]
    assert not log.filter(warning("Not enough SMs to use max_autotune_gemm mode")) and log.filter(warning("another"))


def test_auto_compiles_what_earns_it_back():
    """On a CPU a graph takes 30 s and saves a quarter of the time. At 6 N FLOPs a position and 1e11 FLOP/s, 1e6
    positions of 1e7 parameters take 600 s without, so 150 s are saved: more than twice 30 s and twice 2 x 30 s, not
    twice 3 x 30 s. The demo's pretraining of 520 such seconds was left uncompiled once, and took 1.45 times as long."""
    model, cpu = SimpleNamespace(num_parameters=lambda active: 10_000_000), torch.device("cpu")
    run = lambda positions, shapes: SimpleNamespace(count_positions=lambda _: positions, count_shapes=lambda: shapes)
    assert [compiling.pays(model, cpu, run(1_000_000, shapes), 1) for shapes in (1, 2, 3)] == [True, True, False]
    assert not compiling.pays(model, cpu, run(350_000, 1), 1)
    assert compiling.pays(model, cpu, run(2_000_000, 9), 1), "a compiled run has at most four shapes: 300 s for 4 x 60"
    assert not compiling.pays(model, torch.device("mps"), run(10**9, 1), 1), "it is not known there"


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")
def test_two_compiled_processes_follow_the_same_losses(tmp_path):
    """DDP looks for the parameters of a block that may be compiled."""
    flags = arguments(tmp_path, write_pretrain, None, ["--use_moe"])
    run_stage("pretrain", *flags, f"--save_dir={tmp_path / 'one'}")
    options = [*FLAGS, *SHAPE, *flags, f"--save_dir={tmp_path / 'two'}", "--batch_size=2", "--compile=on"]
    torchrun("train_pretrain.py", *options, cwd=ROOT / "trainer")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
