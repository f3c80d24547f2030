"""What two processes compute, for tests/trainer/test_engine.py: torchrun tests/helpers/gradients_run.py FOLDER

FOLDER/two_ranks.pth gets the gradients of the first step, two_ranks_compiled.pth those of a compiled model, and
FOLDER/rank_0.json what rank 0 makes of a step in which the loss of rank 1 alone is infinite, and its gradient is not.
"""

import functools
import json
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.options import parse
from tests.helpers.runs import FLAGS, first_gradients, sft_engine
from trainer.loop import compiling
from trainer.loop.processes import start
from trainer.train_full_sft import SFTConfig


def compiled_gradients(engine) -> tuple[dict, int]:
    """As `first_gradients`, and how many buckets of gradients were exchanged for it."""
    buckets = []

    def average(_, bucket):
        buckets.append(bucket.index())
        summed = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda done: done.value()[0] / engine.backend.world)

    engine.wrapped.register_comm_hook(None, average)
    return first_gradients(engine), len(buckets)


def one_bad_loss(engine) -> dict:
    """One step -> what the rank made of it."""
    objective, rank = engine.job.objective, engine.backend.rank

    class Bad(type(objective)):
        def __call__(self, model, batch):
            loss, metrics = objective(model, batch)
            return loss, {"loss": metrics["loss"] * (float("inf") if rank == 1 else 1)}

    engine.job.objective = Bad()
    before = [p.detach().clone() for p in engine.model.parameters()]
    engine._set_learning_rate()
    result = engine.train_step(engine.loader.batches(0))
    moved = any(not torch.equal(p, old) for p, old in zip(engine.model.parameters(), before))
    own = [bool(torch.isfinite(loss)) for loss in result.losses]
    counted = dict(units=result.units, tokens=result.tokens)
    finite = bool(torch.isfinite(result.norm))
    return dict(bad=result.bad.item(), moved=moved, own_gradient_is_finite=finite, own=own, **counted)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with start(parse(SFTConfig, FLAGS)) as backend:
        gradients = first_gradients(sft_engine(folder, 4, 2, backend))
        if backend.main:
            torch.save(gradients, folder / "two_ranks.pth")
        found = one_bad_loss(sft_engine(folder, 4, 2, backend))
        # without the code generator, which takes half a minute
        torch.compile, compiling.can_compile = functools.partial(torch.compile, backend="aot_eager"), lambda _: True
        gradients, found["buckets"] = compiled_gradients(sft_engine(folder, 4, 2, backend, compile="on"))
        if backend.main:
            torch.save(gradients, folder / "two_ranks_compiled.pth")
        if backend.main:
            (folder / "rank_0.json").write_text(json.dumps(found))
