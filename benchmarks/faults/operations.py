"""A save that is killed, fails, or loses power at each of its file operations: is the state before still whole?

    python benchmarks/faults/operations.py            # a second save of the newest step, and one of the next step

Two states are there already; `resume.save_state` and `save_weights` write what the engine writes. For every i:

exits       the process exits before its i-th operation, or in the middle of it if it is a write
failures    that operation fails (broken disk), or it and all later ones that need space (full disk)
power_cuts  the power is cut after it. Of what no fsync has covered, the disk then holds nothing, the names without the
            bytes, or any part
"""

import argparse
import errno
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.faults.filesystem import Operations, after_power_cut
from common.manifest import problem, states_in
from model.checkpoint import load_weights, save_weights
from model.config import ModelConfig
from model.transformer import CausalLM
from trainer.run import resume

SHAPE = ModelConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def save(root: Path, step: int, value: float) -> None:
    """What Engine.save does, with every weight `value`."""
    model = CausalLM(SHAPE)
    torch.nn.init.constant_(model.model.norm.weight, value)
    tensors = {"weights": dict(model.named_parameters()), "random": {"cpu": torch.get_rng_state()}}
    resume.save_state(root / "run", step, tensors, {"step": step, "value": value}, keep_last=2)
    save_weights(root / "a.pth", model, tokenizer={}, lineage=[])


def prepare(root: Path) -> None:
    for step in (1, 2, 3):
        save(root, step, step)


def wrong(root: Path, before: float, after: float) -> str:
    """What is wrong after a save of `after` was disturbed; "" if the state before, or the new one, is whole."""
    resume.clean(root, root)  # as the next start does
    said = []
    whole = [path for path in states_in(root / "run") if problem(path) is None]
    values = [resume.read_values(path)["value"] for path in whole]
    if resume.newest_state(root / "run", said.append) is None or said:
        return f"no newest state, or a broken one under its own name: {said}"
    if before not in values and after not in values or len(values) < 2:
        return f"whole states hold {values}"
    weights = load_weights(root / "a.pth").state["model.norm.weight"]
    if not (weights == before).all() and not (weights == after).all():
        return "the weights file is neither the old nor the new one"
    entries = [path.name for folder in (root, root / "run") for path in folder.iterdir()]
    litter = [name for name in entries if name.startswith((".", "broken"))]
    if litter:
        return f"litter: {litter}"
    return ""


def exits(base: Path, root: Path, step: int, every: int = 1) -> tuple[int, list[str]]:
    """The process ends before every operation in turn."""
    tried = 0
    for i in range(0, 10_000, every):
        copy(base, root)
        child = os.fork()
        if child == 0:
            with Operations(root, lambda now, _, i=i: os._exit(9) if now == i else None):
                save(root, step, 9.0)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return tried, []
        tried += 1
        if fault := wrong(root, 3, 9.0):
            return tried, [f"exit at operation {i}: {fault}"]
    raise AssertionError("a save has fewer operations")


def failures(base: Path, root: Path, step: int, every: int = 1) -> tuple[int, list[str]]:
    """Every operation fails in turn: by itself (EIO), or with everything after it that needs space (ENOSPC)."""
    tried, faults = 0, []
    for number in (errno.EIO, errno.ENOSPC):
        i, happened = 0, True
        while happened:
            copy(base, root)
            happened, said = False, None

            def fail(now, operation, i=i, number=number):
                nonlocal happened
                needs_space = operation.kind in ("create", "write", "mkdir", "fsync")
                if now == i if number == errno.EIO else now >= i and needs_space:
                    happened = True
                    raise OSError(number, os.strerror(number))

            try:
                with Operations(root, fail):
                    save(root, step, 9.0)
            except OSError as error:
                said = error
            fault = wrong(root, 3, 9.0)
            if said is not None and (said.filename is None or said.errno != number):
                fault = fault or f"the error does not say where: {said!r}"
            if said is None and resume.read_values(resume.newest_state(root / "run"))["value"] != 9.0:
                fault = fault or "the save failed without an error"
            save(root, step, 10.0)  # again, once there is room
            if len(states_in(root / "run")) != 2 or wrong(root, 10, 10.0):
                fault = fault or "the next save is not whole"
            if fault:
                faults.append(f"{errno.errorcode[number]} at operation {i}: {fault}")
            tried, i = tried + happened, i + every
    return tried, faults


def power_cuts(base: Path, root: Path, step: int, every: int = 1) -> tuple[int, list[str]]:
    copy(base, root)
    with Operations(root) as log:
        save(root, step, 9.0)
    tried, faults, chooser = 0, [], random.Random(0)
    for i in range(0, len(log.done) + 1, every):
        for disk in after_power_cut(base, root, log.done[:i], chooser):
            shutil.rmtree(root)
            disk.write_to(root)
            tried += 1
            if fault := wrong(root, 3, 9.0):
                faults.append(f"power cut after operation {i}: {fault}")
    return tried, faults


def copy(base: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try every N-th operation only")
    every = parser.parse_args().every
    torch.set_num_threads(1)
    failed = 0
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # faults are simulated, no real disk is needed
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        base, root = Path(folder, "base"), Path(folder, "root")
        prepare(base)
        for name, step in (("the next step", 4), ("the same step again", 3)):
            for what, trial in (("exits", exits), ("failing operations", failures), ("power cuts", power_cuts)):
                tried, faults = trial(base, root, step, every)
                failed += len(faults)
                print(f"{name}, {what}: {tried} tried, {len(faults)} times the state before was not whole", flush=True)
                print("".join(f"    {fault}\n" for fault in faults[:5]), end="")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
