"""NaN in the loss, in the gradient, on one process only, in the middle of an accumulation: what is changed, what saved?

    python benchmarks/faults/bad_steps.py             # one process, two, and two under ZeRO 1 to 3

Each case trains some good steps, then meets a row that makes NaN. Counted are the weights and moments that differ from
the state saved before it, the states saved after it, whether the row is named, and whether the processes agree.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.files import ROOT
from common.options import parse
from tests.helpers.rows import write_sft
from tests.helpers.runs import FLAGS, sft_engine
from trainer.loop.backend import Backend
from trainer.loop.launch import deepspeed_config
from trainer.loop.processes import start
from trainer.run import resume
from trainer.train_full_sft import SFTConfig

CASES = list(product(("loss", "gradient"), ("adamw", "muon"), (1, 4)))  # where, optimizer, accumulation_steps
BAD_STEP = 3


def poison(engine, where: str, row: int) -> None:
    """The objective, with NaN in the loss or only in the gradient of whatever batch holds this row."""
    objective = engine.job.objective

    class Poisoned(type(objective)):
        def __call__(self, model, batch):
            loss, metrics = objective(model, batch)
            if row in batch.examples and where == "loss":
                return loss * float("nan"), {"loss": metrics["loss"] * float("nan")}
            if row in batch.examples:  # 0, whose derivative is infinity * 0
                loss = loss + torch.sqrt(engine.model.model.norm.weight.sum() * 0) * 0
            return loss, metrics

    engine.job.objective = Poisoned()


def meet(folder: Path, where: str, optimizer: str, accumulation_steps: int, backend: Backend) -> dict:
    """One run into a bad row -> what came of it."""
    rows = 8 // accumulation_steps // backend.world
    engine = sft_engine(
        folder,
        rows,
        accumulation_steps,
        backend,
        optimizer=optimizer,
        max_steps=6,
        save_interval=1,
        val_interval=1,
        val_fraction=0.1,
        keep_last=9,
    )
    row = int(engine.loader.examples(BAD_STEP - 1)[1])
    poison(engine, where, row)
    source, message = engine.job.data.train.source(row), ""
    try:
        engine.run()
    except ValueError as error:
        message = str(error)
    (state,) = (folder / "out").glob(f"resume/*/{engine.run_id}/step_{BAD_STEP - 1:08d}") if backend.main else [None]
    result = dict(ended=f"the {where} is not finite at step {BAD_STEP}" in message, changed=0, saved=0, named=True)
    with backend.full_weights():
        now = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    now = dict(weights=now, optimizer=backend.optimizer_tensors())  # of all ranks, on the first
    if backend.main:
        tensors, _ = resume.read_state(state)
        result["changed"] = sum(
            not torch.equal(tensor, tensors[kind][name]) for kind in now for name, tensor in now[kind].items()
        )
        result["saved"] = len(list(state.parent.glob(f"step_{BAD_STEP:08d}*")))
        (path,) = (folder / "out").glob(f"runs/*{engine.run_id}/bad_batches.jsonl")
        report = json.loads(path.read_text(encoding="utf-8"))
        result["named"] = source in [row for batch in report["batches"] for row in batch["rows"]]
    digest = sum(float(p.detach().double().sum()) for p in engine.model.parameters())
    everyone = torch.stack(backend.gather(torch.tensor([digest, float(result["ended"])], dtype=torch.float64)))
    return result | dict(agree=bool((everyone == everyone[0]).all()))


def report(title: str, cases, make, folder: Path) -> int:
    """make() -> the backend of a case."""
    folder.mkdir(exist_ok=True)
    faults = []
    for i, case in enumerate(cases):
        backend, here = make(), folder / str(i)
        if backend.main:
            here.mkdir()
            write_sft(here / "sft.jsonl")
        backend.barrier()
        found = meet(here, *case, backend)
        if found != dict(ended=True, changed=0, saved=0, named=True, agree=True):
            faults.append(f"{case}: {found}")
    if backend.main:
        print(
            f"NaN, {title}: {len(cases)} cases, in {len(cases) - len(faults)} of them 0 weights changed, 0 saves, "
            "the row named, all agree"
        )
        print("".join(f"    {fault}\n" for fault in faults), end="", flush=True)
    return int(bool(faults))


def of_two(first: int, every: int, stages: list[int], folder: Path) -> int:
    """What each of two processes does. Under ZeRO: AdamW, the one that it can shard."""
    with start(parse(SFTConfig, ["--device=cpu"])) as backend:
        status = report("two processes", CASES[first::every], lambda: backend, folder / "ddp")
        for stage in stages:
            from trainer.loop.deepspeed import STAGES

            config = parse(SFTConfig, [*FLAGS, f"--zero_stage={stage}"])
            make = lambda: STAGES[stage](backend.device, deepspeed_config(config, backend.world))  # noqa: B023
            adamw = [case for case in CASES if case[1] == "adamw"]
            status |= report(f"two processes, ZeRO-{stage}", adamw, make, folder / f"zero{stage}")
    return status


def two_processes(folder: Path, first: int = 0, every: int = 1, *stages: int) -> subprocess.CompletedProcess:
    """The same under torchrun, or some of it, and under these stages of ZeRO; the row is on one of the two only."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__]
    arguments = [str(argument) for argument in (folder, first, every, *stages)]
    return subprocess.run(command + arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> int:
    if os.environ.get("WORLD_SIZE"):
        first, every, *stages = map(int, sys.argv[2:])
        status = of_two(first, every, stages, Path(sys.argv[1]))
        sys.stdout.flush()
        # torch 2.13 now and then aborts after Python's end, in a process that has made several DDPs
        os._exit(status)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        alone = report("one process", CASES, lambda: Backend(torch.device("cpu")), Path(one))
        return alone or two_processes(Path(two), 0, 1, 1, 2, 3).returncode


if __name__ == "__main__":
    sys.exit(main())
