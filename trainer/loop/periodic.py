"""Which of logging, validating and saving is due after a step."""

from __future__ import annotations

import time

from trainer.stage import StageConfig

SAVE_STEPS, SAVE_MINUTES = 500, 10.0  # of --save_interval and --save_minutes, where neither is given


class PeriodicTasks:
    """Task names are "log", "validate" and "save". All are due after the last step.

    Nothing is validated or saved after a bad step (one that was not finite): it is put off until after the next good
    step, or until the end of the run.

    --save_interval saves every N steps, --save_minutes every M minutes, both whichever is first. With neither, every
    500 steps are a chance to save, which is left out if the last save was less than 10 minutes ago.
    """

    def __init__(self, config: StageConfig, total_steps: int):
        self.total_steps = total_steps
        self.log, self.validate = config.log_interval, config.val_interval
        self.steps, self.minutes = config.save_interval, config.save_minutes
        self.deferred: set[str] = set()
        self.saved()

    def saved(self) -> None:
        """A save begins the wait for the next one."""
        self.last_save = time.monotonic()

    def time_to_save(self) -> bool:
        """Whether enough time has passed. Clocks differ: all ranks have to go by the same one."""
        return time.monotonic() - self.last_save >= 60 * (SAVE_MINUTES if self.minutes is None else self.minutes)

    def due(self, step: int, time_to_save: bool = True) -> set[str]:
        """After this many steps; what was put off is due again."""
        last = step == self.total_steps
        intervals = dict(log=self.log, validate=self.validate)
        due = {task for task, interval in intervals.items() if last or interval and step % interval == 0}
        if last or self._save(step, time_to_save):
            due.add("save")
        due |= self.deferred
        if "save" in due and not self.validate:  # --val_interval 0: validate at every save
            due.add("validate")
        return due

    def _save(self, step: int, time_to_save: bool) -> bool:
        if self.steps is None and self.minutes is None:
            return time_to_save and step % SAVE_STEPS == 0
        reached = bool(self.steps) and step % self.steps == 0
        return reached or self.minutes is not None and time_to_save

    def defer_if_bad(self, due: set[str], step: int, sound: bool) -> set[str]:
        """What of `due` is to be done now, and remembers the rest. sound: whether step number `step` was finite."""
        self.deferred = set() if sound or step == self.total_steps else due - {"log"}
        return due - self.deferred


def count_saves(config: StageConfig, steps: int, seconds: float) -> int:
    """How often a run of so many steps, of `seconds` each, saves; the last time at its end."""
    by_time = 60 * (SAVE_MINUTES if config.save_minutes is None else config.save_minutes) / max(seconds, 1e-9)
    if config.save_interval is None and config.save_minutes is None:
        every = SAVE_STEPS * max(1, -(-by_time // SAVE_STEPS))
    else:
        every = min(config.save_interval or steps, steps if config.save_minutes is None else max(by_time, 1))
    return max(1, round(-(-steps // every)))
