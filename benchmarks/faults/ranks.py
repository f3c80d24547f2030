"""One of two processes is killed, raises, hangs, or both are told to stop: how does the other end, and is the resumed
run the undisturbed one?

    python benchmarks/faults/ranks.py

    kill            the other ends with a message and a status that is not 0; resuming gives the undisturbed weights
    kill+restart    torchrun --max-restarts 1 goes on by itself, to the undisturbed weights
    raise           as kill, and the error is shown
    hang            the other ends within --ddp_timeout (20 s here) + 10 s
    term            SIGTERM to torchrun saves and ends; resuming gives the undisturbed weights
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.files import ROOT
from tests.helpers.rows import write_pretrain
from tests.helpers.runs import FLAGS, SHAPE
from trainer.run import resume

STEPS, AT, TIMEOUT = 12, 7, 20


def worker() -> None:
    """A training process with a fault: FAULT is what happens at step AT on the second one, in its first life."""
    from trainer import train_pretrain
    from trainer.loop import engine

    update, fault = engine.Engine.train_step, os.environ["FAULT"]
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def disturbed(self, *arguments):
        if self.step == AT and first_life:
            if fault == "term" and self.backend.main:
                os.kill(os.getppid(), signal.SIGTERM)  # the launcher, which tells both
                time.sleep(1)
            if self.backend.rank == 1:
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "raise":
                    raise RuntimeError("this process has had enough")
                if fault == "hang":
                    time.sleep(600)
        return update(self, *arguments)

    engine.Engine.train_step = disturbed
    with contextlib.suppress(AttributeError):
        engine.RunLogger.draw = lambda self: None
    from common.console import run

    run(train_pretrain.main)


def torchrun(folder: Path, fault: str, *flags: str, restarts: int = 0) -> tuple[int, str, float]:
    """-> (exit status, what was said, seconds from the fault to the end at most)"""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        f"--max-restarts={restarts}",
        __file__,
        *FLAGS,
        *SHAPE,
        f"--max_steps={STEPS}",
        "--batch_size=2",
        "--save_interval=3",
        f"--save_dir={folder / 'out'}",
        f"--data_path={folder / 'text.jsonl'}",
        f"--ddp_timeout={TIMEOUT}",
        *flags,
    ]
    environment = {**os.environ, "FAULT": fault, "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


def weights(folder: Path) -> dict[str, torch.Tensor]:
    run = sorted((folder / "out" / "resume").glob("*/*"))[-1]
    tensors, _ = resume.read_state(resume.newest_state(run))
    return {**tensors["weights"], **tensors["optimizer"]}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", default=["kill", "kill+restart", "raise", "hang", "term"])
    failed, expected = 0, None
    cases = [(fault.split("+")[0], int("+" in fault)) for fault in ("none", *parser.parse_args().faults)]
    said_by = dict(
        kill="another process of this run",
        hang="another process of this run",
        term="everything is saved",
        **{"raise": "this process has had enough"},
    )
    with tempfile.TemporaryDirectory() as root:
        for fault, restarts in cases:
            folder = Path(root, f"{fault}{restarts}")
            folder.mkdir()
            write_pretrain(folder / "text.jsonl")
            status, said, seconds = torchrun(folder, fault, restarts=restarts)
            problems = []
            if (status == 0) != (fault == "none" or restarts > 0):
                problems.append(f"status {status}")
            if said_by.get(fault, "") not in said:
                problems.append(f"it does not say {said_by[fault]!r}")
            if status:  # by hand, as the message says
                again, more, _ = torchrun(folder, "none", "--from_resume=auto")
                problems += [f"not resumed: {more[-2000:]}"] if again or "resumed after step" not in more else []
            expected = expected or weights(folder)
            if not same(expected, weights(folder)):
                problems.append("other weights than the undisturbed run's")
            failed += bool(problems)
            verdict = "; ".join(problems) or "as documented, and then the undisturbed run's weights"
            print(f"two processes, {fault}, {restarts} restarts: status {status}, {seconds:.0f} s in all; {verdict}")
            if problems:
                print(said[-3000:])
    return int(failed > 0)


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE"):
        worker()
    else:
        sys.exit(main())
