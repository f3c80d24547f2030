"""Training runs small enough for tests: a few rows, a model of some thousand parameters, the shipped tokenizer."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import ROOT

FLAGS = [
    "--device=cpu",
    "--dtype=float32",
    "--compile=off",
    "--max_seq_len=32",
    "--log_interval=2",
    "--save_interval=0",
    "--recipe=classic",
    "--learning_rate=1e-2",
    "--num_workers=1",
]
SHAPE = ["--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=2", "--num_key_value_heads=1"]


def run_stage(stage: str, *flags: str) -> None:
    """`python trainer/train_<stage>.py` in this process."""
    module = __import__(f"trainer.train_{stage}", fromlist=["main"])
    before = sys.argv
    sys.argv = [f"trainer/train_{stage}.py", *FLAGS, *(SHAPE if stage == "pretrain" else []), *map(str, flags)]
    try:
        module.main()
    finally:
        sys.argv = before


def run_script(script: str, *words: object, typed: str = "") -> tuple[int, str, str]:
    """Any script of ours, in this process, from the directory we are in -> exit status, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin, list(sys.path)
    sys.argv, sys.stdin = [script, *map(str, words)], io.StringIO(typed)
    sys.path.insert(0, "")  # what the interpreter would put there, for the script to replace
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, sys.stdin, sys.path[:] = before
    return status, out.getvalue(), err.getvalue()


def torchrun(*arguments: object, cwd=ROOT, processes: int = 2, check=True) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc_per_node <processes> <arguments>`, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def train_twice(stage, tmp_path, stop_at, stops, *flags):
    """-> (weights, optimiser state) of an undisturbed run and of one that was stopped and resumed at `stops`."""
    from trainer.run.resume import read_state

    results = []
    for folder, numbers in ((tmp_path / "whole", []), (tmp_path / "parts", stops)):
        arguments = [*flags, f"--save_dir={folder}"]
        for number in numbers:
            stop_at(number)
            with pytest.raises(SystemExit) as end:
                run_stage(stage, *arguments, "--from_resume=auto")
            assert end.value.code == 128 + signal.SIGTERM
        stop_at(None)
        run_stage(stage, *arguments, "--from_resume=auto")
        (state,) = folder.glob("resume/*/*/step_00000008")
        tensors, _ = read_state(state)
        results.append({**tensors["weights"], **tensors["optimizer"]})
    return results


def sft_engine(folder: Path, batch_size: int, accumulation_steps: int, backend=None, **changes):
    """An engine over `write_sft`'s rows with a fixed random model, ready for one step."""
    import torch

    from common.options import parse
    from dataset.tokens.examples import SFTDataset
    from tests.helpers.models import TOKENIZER, small_model
    from trainer.inputs import open_data
    from trainer.loop.backend import Backend
    from trainer.loop.engine import Engine, Job
    from trainer.losses.next_token import NextToken
    from trainer.train_full_sft import SFTConfig

    flags = [
        *FLAGS,
        f"--data_path={folder / 'sft.jsonl'}",
        f"--save_dir={folder / 'out'}",
        "--grad_clip=0",
        f"--batch_size={batch_size}",
        f"--accumulation_steps={accumulation_steps}",
    ]
    config = parse(SFTConfig, flags + [f"--{k}={v}" for k, v in changes.items()])
    data = open_data(SFTDataset, config, "sft", TOKENIZER, on_long="truncate")
    job = Job("full_sft", config, small_model(num_experts=4), NextToken(), TOKENIZER, data, packing=True)
    return Engine(job, backend or Backend(torch.device("cpu")))


def first_gradients(engine) -> dict:
    """What one optimiser step would see, by parameter name."""
    engine.backend.optimizers = []
    engine.train_step(engine.loader.batches(0))
    return {name: parameter.grad.clone() for name, parameter in engine.model.named_parameters()}
