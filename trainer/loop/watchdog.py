"""Watches the loss and gradient of every step. Steps that are not finite, and spikes, are reported with their rows.

`record` keeps what came of each step; `check` judges all steps since the last check. A check waits for the device, so
on accelerators it happens only to log and before anything is saved. The optimisers have left a bad step out long before
that. Every rank sees the numbers of all ranks, so all decide the same.

    not finite   the weights stay as they were; --on_nan stop ends the run, skip goes on, for at most --max_bad_steps
                 bad steps in a row
    spike        a loss more than --spike_sigma standard deviations above the mean of the last 100: only reported
    fp16         a gradient that overflows while the loss is finite halves the loss scale; this is not an error

Reports are lines of bad_batches.jsonl in the run's directory:
    {"step": 812, "reason": "the loss is not finite", "loss": "nan", "grad_norm": "nan",
     "batches": [{"rank": 1, "micro_batch": 0, "loss": "nan", "rows": ["chat.jsonl:4711", ...]}]}
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.console import UserError
from trainer.loop.backend import Backend
from trainer.loop.step import StepResult
from trainer.stage import StageConfig

INITIAL_LOSS_SCALE = 2.0**14  # of fp16: halved at every overflow, doubled after so many good steps:
STEPS_TO_DOUBLE = 2000
HISTORY, MIN_HISTORY = 100, 20  # a spike is measured against the last 100 losses, once there are 20


@dataclass(frozen=True)
class Step:
    number: int  # from 1
    units: float  # of all ranks
    examples: list[tuple[int, ...]]  # what each micro-batch of this rank was computed from
    losses: list[Tensor]  # of each micro-batch of this rank, summed over its units
    norm: Tensor
    bad: Tensor


class Watchdog:
    """source: number of an example -> "file:line"; scaled: whether the loss is scaled (fp16)."""

    def __init__(
        self,
        config: StageConfig,
        backend: Backend,
        source: Callable[[int], str],
        scaled: bool,
        path: Path,
        say: Callable[[str], None],
    ):
        self.config, self.backend, self.source, self.path, self.say = config, backend, source, path, say
        self.scaled, self.scale = scaled, INITIAL_LOSS_SCALE if scaled else 1.0
        self.steps: list[Step] = []
        self.recent: deque[float] = deque(maxlen=HISTORY)
        self.good, self.bad_in_a_row = 0, 0  # good steps since the last overflow

    def state(self) -> dict:
        """What a resumed run goes on with: fp16's loss scale, and the good steps since it changed (None: no fp16)."""
        return dict(scale=self.scale, good=self.good if self.scaled else None)

    def restore(self, state: dict) -> None:
        """The inverse. A run in another precision has saved a scale of 1; older runs in fp16 no number of steps."""
        if self.scaled and (state["scale"] > 1 or state.get("good") is not None):
            self.scale, self.good = state["scale"], state.get("good") or 0

    def record(self, number: int, result: StepResult) -> None:
        """Keeps the verdict on step `number` (from 1) until the next check. The batches themselves are not kept, only
        which examples they held: it is not always possible to make them again (`Job.rollout`)."""
        examples = [batch.examples for batch in result.batches]
        self.steps.append(Step(number, result.units, examples, result.losses, result.norm, result.bad))

    def check(self) -> bool:
        """Judges the steps recorded since the last check -> whether the newest is finite. UserError to end training."""
        if not self.steps:
            return not self.bad_in_a_row
        steps, self.steps = self.steps, []
        own = torch.stack([loss for step in steps for loss in step.losses]).cpu().double()
        everyone = torch.stack(self.backend.gather(own)).split([len(step.losses) for step in steps], dim=1)
        verdicts = torch.stack([torch.stack([step.norm, step.bad]) for step in steps]).tolist()
        for step, losses, (norm, bad) in zip(steps, everyone, verdicts):  # losses: (ranks, micro-batches)
            if bad:
                self._judge_bad(step, losses, norm)
            else:
                self._judge_good(step, losses, norm)
        return not self.bad_in_a_row

    def _judge_bad(self, step: Step, losses: Tensor, norm: float) -> None:
        not_finite = ~torch.isfinite(losses)
        if self.scale > 1 and not not_finite.any():
            self.scale, self.good = self.scale / 2, 0
            return
        what = "loss" if not_finite.any() else "gradient"
        # the norm is of the whole step: it does not tell which micro-batch has spoiled the gradient
        guilty = not_finite if not_finite.any() else torch.ones_like(not_finite)
        rows = self._report(step, f"the {what} is not finite", losses, norm, guilty)
        self.bad_in_a_row += 1
        message = f"the {what} is not finite at step {step.number:,} (gradient norm {norm:g}), in {rows}; the weights "
        if self.config.on_nan == "stop":
            raise UserError(
                f"{message}were not changed by it and nothing was saved after it. Look at these rows, lower "
                "--learning_rate, or pass over such steps: --on_nan skip"
            )
        if self.bad_in_a_row > self.config.max_bad_steps:
            raise UserError(
                f"{message}were not changed by it, nor by the {self.bad_in_a_row - 1} bad steps before it, and nothing "
                "was saved after the first. More than --max_bad_steps in a row: this is no longer a matter of single "
                "rows; lower --learning_rate and continue with --from_resume auto"
            )
        self.say(f"{message}were not changed by it; going on ({self.bad_in_a_row} in a row)")

    def _judge_good(self, step: Step, losses: Tensor, norm: float) -> None:
        self.bad_in_a_row, self.good = 0, self.good + 1
        if self.scaled and self.good % STEPS_TO_DOUBLE == 0:
            self.scale *= 2
        loss, sigma = float(losses.sum()) / step.units, self.config.spike_sigma
        if sigma and len(self.recent) >= MIN_HISTORY:
            mean = statistics.fmean(self.recent)
            deviation = max(statistics.pstdev(self.recent), 1e-3 * abs(mean), 1e-6)
            if loss > mean + sigma * deviation:
                many = f"{(loss - mean) / deviation:.1f} sigma above {mean:.4f}"
                rows = self._report(step, f"the loss is {many}", losses, norm, losses == losses)
                self.say(f"loss spike at step {step.number:,}: {loss:.4f}, {many}, in {rows}")
        self.recent.append(loss)

    def _report(self, step: Step, reason: str, losses: Tensor, norm: float, guilty: Tensor) -> str:
        """Writes a line of bad_batches.jsonl -> text that names the first rows. All ranks have to call it.

        losses, guilty: (ranks, micro-batches)
        """
        examples = self.backend.gather_objects(step.examples)  # examples[rank][micro_batch]
        batches, named = [], []
        for rank, micro_batch in guilty.nonzero().tolist():
            rows = [self.source(example) for example in examples[rank][micro_batch]]
            loss = _number(losses[rank, micro_batch].item())
            batches.append(dict(rank=rank, micro_batch=micro_batch, loss=loss, rows=rows))
            named += rows
        loss = _number(float(losses.sum()) / step.units)
        record = dict(step=step.number, reason=reason, loss=loss, grad_norm=_number(norm), batches=batches)
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        if self.backend.main:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                more += f" ({self.path} lists them)"
            except OSError as error:  # a report that cannot be written must not end the run
                self.say(f"warning: {self.path}: {error.strerror}")
        return ", ".join(named[:3]) + more


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they become text."""
    return round(value, 6) if math.isfinite(value) else str(value)
