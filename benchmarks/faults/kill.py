"""`kill -9` of a run that saves after every step, again and again in the same directory: half of the time at a random
moment, half of the time at a random moment of the 20 ms after a save begins.

    python benchmarks/faults/kill.py                      # 1,000 trials, some minutes
    python benchmarks/faults/kill.py --trials 50

Every trial is a process that resumes (--from_resume auto), trains, and is killed. Then every state under its own name
has to be whole, a finished state may be missing only if there are two newer ones, and the weights file has to load.
The process is forked from one that has trained already, which makes a trial cheap. Nothing is logged: drawing the loss
curve would take most of the time of a save.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

KEPT = 2


def train(folder: Path, steps: int = 1_000_000) -> None:
    from tests.helpers.runs import run_stage

    run_stage(
        "pretrain",
        "--hidden_size=8",
        "--log_interval=1000000",
        "--save_interval=1",
        f"--keep_last={KEPT}",
        "--batch_size=4",
        "--schedule=constant",
        f"--max_steps={steps}",
        "--from_resume=auto",
        f"--data_path={folder / 'text.jsonl'}",
        f"--save_dir={folder}",
    )


def watch(shared: mmap.mmap) -> None:
    """Makes runs write to `shared` whether they are in a save, and the last step that they saved; no logs."""
    from tokenizer.text import Tokenizer
    from trainer.loop.engine import Engine
    from trainer.run.logger import NoLogger, RunLogger

    save, tokenizer, here = Engine.save, Tokenizer.load(), os.getpid()

    def watched(self):
        if here not in (os.getpid(), os.getppid()):
            os._exit(1)  # the process that would kill it is gone
        shared[0:4] = struct.pack("i", 1)
        save(self)
        shared[0:8] = struct.pack("ii", 0, self.step)

    Engine.save, RunLogger.create = watched, lambda *_, **__: NoLogger()
    Tokenizer.load = lambda *_: tokenizer


def trial(folder: Path, shared: mmap.mmap, seconds: float, aimed: bool) -> tuple[bool, int, str]:
    """A run is killed `seconds` after its first save or, if `aimed`, after the start of a save -> (whether that was
    inside a save, the last step that had been saved, what is wrong then)"""
    from common.manifest import number_of, problem, states_in
    from model.checkpoint import load_weights

    shared[0:8] = struct.pack("ii", 0, -1)
    child = os.fork()
    if child == 0:
        try:
            train(folder)
        finally:
            os._exit(1)
    while struct.unpack("ii", shared[0:8])[1] < 0:  # its first save
        time.sleep(0.002)
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError("the run ended by itself")
    while aimed and not shared[0]:
        time.sleep(0.0002)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside, last = struct.unpack("ii", shared[0:8])

    states = [state for run in folder.glob("resume/*/*") for state in states_in(run)]
    steps = [number_of(state)[0] for state in states]
    fault = "".join(f"{state.name}: {reason}; " for state in states if (reason := problem(state)))
    if list(folder.glob("resume/*/*/broken-*")):
        fault += "a state had to be set aside; "
    if max(steps, default=-1) < last or len(steps) < KEPT:
        fault += f"lost: {steps} lie there, {last} had been saved"
    load_weights(folder / "pretrain_8.pth")
    return bool(inside), last, fault


def run(trials: int, seed: int = 0) -> dict[str, int]:
    import torch

    from tests.helpers.rows import write_pretrain

    torch.set_num_threads(1)
    chooser, shared = random.Random(seed), mmap.mmap(-1, 8)
    counts = dict(trials=0, inside=0, faults=0, litter=0, steps=0)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))  # a kill cuts no power
    try:
        write_pretrain(folder / "text.jsonl")
        watch(shared)
        train(folder, steps=KEPT)  # what is imported and built at first use is there before the forks
        for _ in range(trials):
            aimed = chooser.random() < 0.5
            inside, last, fault = trial(folder, shared, chooser.random() * (0.02 if aimed else 0.1), aimed)
            litter = [path for path in (*folder.glob(".*.tmp"), *folder.glob("resume/*/*/.*.tmp"))]
            counts["trials"] += 1
            counts["inside"] += inside
            counts["faults"] += bool(fault)
            counts["steps"] = max(counts["steps"], last)
            counts["litter"] = max(counts["litter"], len(litter))
            if fault:
                print(f"    trial {counts['trials']}: {fault}", flush=True)
    finally:
        shutil.rmtree(folder)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    counts = run(parser.parse_args().trials)
    print(
        "kill -9: {trials} trials, {inside} of them inside a save; {faults} with a state that does not load or is "
        "lost; {steps} steps in all; at most {litter} leftovers at a time".format(**counts)
    )
    return int(counts["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main())
