"""How far the demo is, and how long the rest takes.

forecast = Forecast({"pretrain": 480, "full_sft": 138, "exam": 30})       # seconds on some machine
watch = Watch(forecast, "pretrain")
call(command, watch.line, with_stderr=True)                                # each line that a training prints
watch.close()
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections import deque
from datetime import timedelta

from common.console import printable, say

STEP = re.compile(r"step ([\d,]+)/([\d,]+)  (?:(loss \S+))?")  # as trainer/run/logger.py prints it
RESUMED = re.compile(r"resumed after step ([\d,]+) of ")
SHOWN = ("done in", "saved to", "warning", "error")  # beginnings of lines that are shown as they are
SECONDS = 30  # between two lines where the output is no terminal
LAST = 20  # lines of a command that are kept, to be shown if it fails


class Forecast:
    """Seconds that are left, from what each part takes on some machine: only the ratios count.

    How much slower this machine is follows from the parts that are over, and from what is done of the present one.
    """

    def __init__(self, seconds: dict[str, float]):
        self.seconds = dict(seconds)  # of the parts that are not over
        self.known, self.taken = 0.0, 0.0  # seconds of what is over: on that machine, and here

    def leave_out(self, part: str) -> None:
        """It is up to date already."""
        del self.seconds[part]

    def finish(self, part: str, taken: float, share: float = 1.0) -> None:
        """A part is over. share: of it that was done here; the rest was done by an earlier start."""
        self.known, self.taken = self.known + share * self.seconds.pop(part), self.taken + taken

    def later(self, part: str, taken: float, share: float) -> float:
        """Of the parts after the present one. taken: its seconds so far, in which this share of it was done."""
        slower = (self.taken + taken) / (self.known + share * self.seconds[part])
        return slower * sum(seconds for other, seconds in self.seconds.items() if other != part)


class Watch:
    """Shows how far one part is: on a terminal in a line that is rewritten, elsewhere in a line every half minute."""

    def __init__(self, forecast: Forecast, part: str, verbose: bool = False):
        self.forecast, self.part, self.verbose = forecast, part, verbose
        self.last: deque[str] = deque(maxlen=LAST)
        self.began = self.printed = time.monotonic()
        self.start, self.share = 0, 1.0  # the step that the training continues after, and what is done here
        self.first: tuple[float, int] | None = None  # time and number of the first step seen
        self.bar = None

    def line(self, text: str) -> None:
        """Takes a line that the command has printed."""
        self.last.append(text)
        if found := RESUMED.match(text):
            self.start = _number(found[1])
        if self.verbose:
            say(text)
        elif found := STEP.match(text):
            self._step(_number(found[1]), _number(found[2]), found[3] or "")
        elif text.startswith(SHOWN):
            self.bar.write(printable(text)) if self.bar else say(text)

    def _step(self, step: int, total: int, text: str) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now, step
        self.share = (step - self.start) / total
        if step > self.first[1]:  # the first steps wait for the start-up
            rest = (now - self.first[0]) / (step - self.first[1]) * (total - step)
            whole = rest + self.forecast.later(self.part, now - self.began, self.share)
            text += f", {_time(rest)} left of this stage, {_time(whole)} of everything"
        if sys.stderr.isatty():
            if self.bar is None:
                from tqdm import tqdm

                form = "{n_fmt}/{total_fmt} |{bar:20}| {desc}"
                self.bar = tqdm(total=total, initial=step, dynamic_ncols=True, leave=False, bar_format=form)
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.printed >= SECONDS:
            self.printed = now
            say(f"step {step:,}/{total:,}  {text}")

    def close(self) -> None:
        """After the command has ended well."""
        if self.bar:
            self.bar.close()
        self.forecast.finish(self.part, time.monotonic() - self.began, self.share)

    def fail(self, status: int) -> None:
        """After it has failed: shows its last lines. After Ctrl-C or SIGTERM, its last one says that all is saved."""
        if self.bar:
            self.bar.close()
        if not self.verbose:
            stopped = status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
            say("\n".join(list(self.last)[-1:] if stopped else ["its last lines:", *self.last]))


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
