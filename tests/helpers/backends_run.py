"""What two processes do under each backend, for tests/trainer/test_backends.py:

    torchrun tests/helpers/backends_run.py FOLDER 8 zero2

Everything happens in one pair of processes, since importing DeepSpeed takes longer than what is tested.
"""

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.helpers.runs import FLAGS, sft_engine

BACKENDS = {
    "ddp": [],
    "zero0": ["--zero_stage=0"],
    "zero1": ["--zero_stage=1"],
    "zero2": ["--zero_stage=2"],
    "zero3": ["--zero_stage=3"],
    "offload": ["--zero_stage=2", "--zero_offload=optimizer"],
    "offload3": ["--zero_stage=3", "--zero_offload=parameters"],
}
SPLITS = {1: 12, 3: 4}  # accumulation -> rows at once of one process; two take half
WHOLE, HALF = 6, 3  # steps of a run that is stopped and resumed


def make(name: str, device):
    """A backend inside the process group that is there already."""
    from common.options import parse
    from trainer.loop.backend import DDP, Backend
    from trainer.loop.deepspeed import STAGES
    from trainer.loop.launch import deepspeed_config
    from trainer.train_full_sft import SFTConfig

    name = name.removesuffix("_from_one")
    if name in ("one", "ddp"):
        return Backend(device) if name == "one" else DDP(device)
    config = parse(SFTConfig, [*FLAGS, *BACKENDS[name], "--grad_clip=0"])
    merged = deepspeed_config(config, 2)
    merged["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else these small ones are not sharded
    return STAGES[config.zero_stage](device, merged)


def one_sgd_step(folder, name, device, batch_size, accumulation_steps):
    """-> (gradient norm, every parameter's change), by plain SGD with rate 1, whatever computes it."""
    import torch

    from trainer.loop import engine as engine_module

    build = engine_module.build_optimizers
    engine_module.build_optimizers = lambda model, *_: [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)]
    try:
        engine = sft_engine(folder, batch_size, accumulation_steps, make(name, device))
    finally:
        engine_module.build_optimizers = build
    before = weights(engine)
    result = engine.train_step(engine.loader.batches(0))
    after = weights(engine)
    return result.norm.item(), result.bad.item(), {name: after[name] - before[name] for name in after}


def weights(engine) -> dict:
    with engine.backend.full_weights():
        return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


def train(engine, until: int) -> list[float]:
    """AdamW from where the engine stands -> the losses; every rank has another number of trained tokens."""
    losses = []
    for step in range(engine.step, until):
        engine._set_learning_rate()
        result = engine.train_step(engine.loader.batches(step))
        engine.step = step + 1
        losses.append(engine.backend.sum(float(result.metrics["loss"]))[0] / result.units)
    return losses


def stop_and_resume(folder, name, device, rows, state=None, optimizer="adamw"):
    """-> losses after a resume from `state` (default: own), whether they are the undisturbed run's, the state's path"""
    options = dict(max_steps=WHOLE, save_dir=folder / f"{name}_{optimizer}", optimizer=optimizer)
    whole = sft_engine(folder, rows, 1, make(name, device), **options)
    train(whole, HALF)
    whole.save()
    losses, end = train(whole, WHOLE), weights(whole)
    resumed = sft_engine(folder, rows, 1, make(name, device), **options, from_resume=state or whole.states)
    again, found = train(resumed, WHOLE), weights(resumed)
    same = again == losses and all((found[n] == end[n]).all().item() for n in end)
    return losses, again, same, str(whole.states)


def measure(folder, name, device, steps: int, world: int, state=None) -> dict:
    from model.checkpoint import load_weights

    found = dict(sgd={k: one_sgd_step(folder, name, device, rows // world, k) for k, rows in SPLITS.items()})
    engine = sft_engine(folder, 8 // world, 1, make(name, device), max_steps=steps, save_dir=folder / f"{name}_file")
    found["losses"] = train(engine, steps)
    found["bytes"] = sizes(engine)
    engine.save()
    if engine.backend.main:
        found["file"] = dict(load_weights(folder / f"{name}_file" / "full_sft_32_moe.pth").state)
    rows = 8 // world
    *losses, found["resumed_equal"], found["state"] = stop_and_resume(folder, name, device, rows)
    found["resumed"] = losses
    if name in ("one", "ddp"):
        found["muon"] = stop_and_resume(folder, name, device, rows, optimizer="muon")[:3]
        found["update"] = muon_update()
    if state:
        found["from_one"] = stop_and_resume(folder, name + "_from_one", device, rows, state)[1]
    return found


def muon_update() -> list:
    """What three steps of Muon make of the same matrices and gradients on every rank: three and two of a shape, which
    two processes cannot share evenly, and a stack of experts. Nothing in it is deprecated: each rank would say so."""
    import torch

    from trainer.loop.optim import Muon

    torch.manual_seed(0)
    shapes = [(24, 40)] * 3 + [(40, 24)] * 2 + [(5, 16, 24)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Muon(parameters, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.02
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            optimizer.step()
    return [parameter.detach() for parameter in parameters]


def sizes(engine) -> tuple[int, int]:
    """(optimiser's, parameters') bytes on this rank."""
    moments = sum(t.nbytes for o in engine.optimizers for s in o.state.values() for t in s.values())
    kept = sum(getattr(p, "ds_tensor", p).nbytes for p in engine.model.parameters())
    return moments, kept


if __name__ == "__main__":
    import torch

    from common.options import parse
    from model import transformer
    from trainer.loop.processes import start
    from trainer.train_full_sft import SFTConfig

    transformer.LOGITS_AT_ONCE = 1  # in chunks: the head's weight has to be there then, also where it is sharded
    folder, steps, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    state = json.loads((folder / "one.json").read_text())
    with start(parse(SFTConfig, [*FLAGS, "--backend=ddp"])) as backend, contextlib.redirect_stdout(io.StringIO()):
        found = {name: measure(folder, name, backend.device, steps, 2, state) for name in names}
        torch.save(found, folder / f"found{backend.rank}.pth")
