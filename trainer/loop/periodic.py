"""Which of logging, validating and saving is due after a step."""

from __future__ import annotations

from trainer.stage import StageConfig


class PeriodicTasks:
    """Task names are "log", "validate" and "save". All are due after the last step.

    Nothing is validated or saved after a bad step (one that was not finite): it is put off until after the next good
    step, or until the end of the run.
    """

    def __init__(self, config: StageConfig, total_steps: int):
        self.total_steps = total_steps
        self.intervals = dict(log=config.log_interval, validate=config.val_interval, save=config.save_interval)
        self.deferred: set[str] = set()

    def due(self, step: int) -> set[str]:
        """After this many steps; what was put off is due again."""
        last = step == self.total_steps
        due = {task for task, interval in self.intervals.items() if last or interval and step % interval == 0}
        due |= self.deferred
        if "save" in due and not self.intervals["validate"]:  # --val_interval 0: validate at every save
            due.add("validate")
        return due

    def defer_if_bad(self, due: set[str], step: int, sound: bool) -> set[str]:
        """What of `due` is to be done now, and remembers the rest. sound: whether step number `step` was finite."""
        self.deferred = set() if sound or step == self.total_steps else due - {"log"}
        return due - self.deferred
