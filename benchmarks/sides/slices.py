"""Training in turns: a process that trains only while it has been told to, so that several can share a machine.

    slices = Slices()               # stdout now belongs to the turns; what others print goes to stderr
    slices.begin()                  # waits for the first turn
    ...                             # reads data, builds the model: this is part of the time
    slices.before_step(save)        # before each step: when the turn is over, saves the weights and waits for the next
    slices.end(save)                # after the last step

benchmarks/against_minimind.py gives the turns: a line {"seconds": 20, "weights": "/tmp/x.pth"} on stdin. The answer is
{"steps", "seconds", "setup", "done"}: of all turns together, and the seconds until the first step. This file imports
nothing of Sparrow, because it runs beside another project, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Slices:
    def __init__(self):
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.steps, self.spent, self.setup = 0, 0.0, 0.0

    def begin(self) -> None:
        line = sys.stdin.readline()
        if not line:  # nobody needs more of it
            os._exit(0)
        order = json.loads(line)
        self.seconds, self.weights = order["seconds"], Path(order["weights"])
        self.began = time.perf_counter()

    def before_step(self, save: Callable[[Path], None]) -> None:
        if not self.steps:
            self.setup = self.spent + time.perf_counter() - self.began
        elif time.perf_counter() - self.began >= self.seconds:
            self._hand_over(save, done=False)
            self.begin()
        self.steps += 1

    def end(self, save: Callable[[Path], None]) -> None:
        self._hand_over(save, done=True)

    def _hand_over(self, save: Callable[[Path], None], done: bool) -> None:
        self.spent += time.perf_counter() - self.began
        save(self.weights)  # for the judge: no part of the time
        answer = dict(steps=self.steps, seconds=self.spent, setup=self.setup, done=done)
        print(json.dumps(answer), file=self.channel, flush=True)
