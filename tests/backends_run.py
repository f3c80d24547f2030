"""What two processes do under each backend, for tests/test_backends.py: torchrun tests/backends_run.py FOLDER.

Everything happens in one pair of processes, since importing DeepSpeed takes longer than what is tested.
"""

import sys
from pathlib import Path

from small_run import FLAGS, sft_engine

BACKENDS = {
    "ddp": ["--backend=ddp"],
    "zero0": ["--zero_stage=0"],
    "zero1": ["--zero_stage=1"],
    "zero2": ["--zero_stage=2"],
    "zero3": ["--zero_stage=3"],
    "offload": ["--zero_stage=2", "--zero_offload=optimizer"],
    "offload3": ["--zero_stage=3", "--zero_offload=parameters"],
}
SPLITS = {1: 12, 2: 6, 6: 2}  # accumulation -> rows at once of one process; two take half


def one_sgd_step(folder, backend, batch_size, accumulation_steps, world):
    """-> (gradient norm, every parameter's change), by plain SGD with rate 1, whatever computes it."""
    import torch

    from trainer import engine as engine_module

    build = engine_module.build_optimizers
    engine_module.build_optimizers = lambda model, *_: [torch.optim.SGD(model.parameters(), lr=1.0, fused=True)]
    try:
        engine = sft_engine(folder, batch_size // world, accumulation_steps, backend)
    finally:
        engine_module.build_optimizers = build
    before = weights(engine)
    batches = engine.loader.batches(0)
    (units,) = engine.backend.sum(sum(map(engine.job.objective.count, batches)))
    _, norm, bad = engine._update(batches, units)
    assert not bad
    after = weights(engine)
    return norm.item(), {name: after[name] - before[name] for name in after}


def weights(engine) -> dict:
    with engine.backend.whole():
        return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


def fifty_steps(folder, backend, world) -> list[float]:
    """Losses of 50 AdamW steps, unequal token counts on the ranks."""
    engine = sft_engine(folder, 8 // world, 1, backend, max_steps=50)
    losses = []
    for step in range(50):
        batches = engine.loader.batches(step)
        (units,) = engine.backend.sum(sum(map(engine.job.objective.count, batches)))
        engine.step = step
        engine._set_learning_rate()
        metrics, _, _ = engine._update(batches, units)
        losses.append(engine.backend.sum(float(metrics["loss"]))[0] / units)
    return losses


def measure(folder, make, world=1) -> dict:
    steps = {split: one_sgd_step(folder, make(), rows, split, world) for split, rows in SPLITS.items()}
    return dict(steps=steps, losses=fifty_steps(folder, make(), world))


if __name__ == "__main__":
    import torch

    from trainer.backend import DDP, start
    from trainer.config import parse
    from trainer.launch import deepspeed_config
    from trainer.train_full_sft import SFTConfig
    from trainer.zero import STAGES

    folder = Path(sys.argv[1])
    names = sys.argv[2:] or BACKENDS
    with start(parse(SFTConfig, [*FLAGS, "--backend=ddp"])) as backend:
        found = {}
        for name in names:

            def make(flags=BACKENDS[name]):
                config = parse(SFTConfig, [*FLAGS, *flags, "--grad_clip=0", f"--deepspeed_config={folder / 'ds.json'}"]
                               if "ddp" not in flags[0] else [*FLAGS, *flags])  # fmt: skip
                if config.backend == "ddp":
                    return DDP(backend.device)
                return STAGES[config.zero_stage](backend.device, deepspeed_config(config, backend.world))

            found[name] = measure(folder, make, world=2)
        if backend.main:
            torch.save(found, folder / "found.pth")
