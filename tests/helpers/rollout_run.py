"""A stage whose targets the model writes itself, for tests/trainer/test_rollout.py. What two processes do with it:

torchrun tests/helpers/rollout_run.py FOLDER
"""

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder: its tokenizers.py hides the package

import torch

from tests.helpers.runs import FLAGS, sft_engine


class OwnAnswers:
    """Trains the model on tokens that it predicts now, at every second of the positions that the data trains.

    So the targets depend on the weights, and the number of trained tokens is not the loader's. The micro-batches come
    in reverse order, so a micro-batch's place does not say which rows it holds.
    """

    def __init__(self, sample: bool):
        self.sample = sample  # from torch's generator, or the most likely token

    def __call__(self, model, batches, step):
        model.eval()
        answered = [self.answer(model, batch) for batch in reversed(batches)]
        model.train()
        return answered

    @torch.no_grad()
    def answer(self, model, batch):
        logits = model(batch.tokens, documents=batch.documents, positions=batch.positions).logits  # (B, T, V)
        if self.sample:
            own = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view_as(batch.targets)
        else:
            own = logits.argmax(-1)
        trained = (batch.targets != -100) & (batch.positions % 2 == 0)
        targets = torch.where(trained, own, -100)
        return replace(batch, targets=targets, selected=None, trained_tokens=int(trained.sum()))


def engine_with_rollout(folder, batch_size, accumulation_steps, backend=None, sample=False, **changes):
    engine = sft_engine(folder, batch_size, accumulation_steps, backend, **changes)
    engine.job.rollout = OwnAnswers(sample)
    return engine


def poison(engine, example: int) -> None:
    """NaN in the loss of the batch that holds this example."""
    objective = engine.job.objective

    class Poisoned(type(objective)):
        def __call__(self, model, batch):
            loss, metrics = objective(model, batch)
            factor = float("nan") if example in batch.examples else 1.0
            return loss * factor, {"loss": metrics["loss"] * factor}

    engine.job.objective = Poisoned()


def run(folder: Path, name: str, batch_size: int, accumulation_steps: int, backend=None) -> dict:
    """Four steps, then a fifth that goes wrong in one row of rank 1 -> the weights and losses, and which row it was."""
    options = dict(max_steps=9, log_interval=1, save_dir=folder / name)
    engine = engine_with_rollout(folder, batch_size, accumulation_steps, backend, **options)
    losses = []
    for step in range(4):
        engine._set_learning_rate()
        result = engine.train_step(engine.loader.batches(step))
        engine.step += 1
        losses.append(engine.backend.sum(float(result.metrics["loss"]))[0] / result.units)
    weights = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    culprit = engine.loader.rows(4)[-1][0]  # rows are dealt in turn: the last of an even number belongs to rank 1
    poison(engine, culprit)
    message = ""
    try:
        engine.run()
    except ValueError as error:
        message = str(error)
    return dict(weights=weights, losses=losses, message=message, culprit=engine.job.data.train.source(culprit))


if __name__ == "__main__":
    from common.options import parse
    from trainer.loop.processes import start
    from trainer.train_full_sft import SFTConfig

    folder = Path(sys.argv[1])
    with start(parse(SFTConfig, FLAGS)) as backend, contextlib.redirect_stdout(io.StringIO()):
        torch.save(run(folder, "two", 2, 2, backend), folder / f"rank{backend.rank}.pth")
