"""Whether a run is on track: its loss beside the curve of earlier runs of the same thing.

    reference = find_reference(config.reference_curve, facts)     # None: there is no curve of such runs
    warning = reference.add(tokens=40960, loss=5.21)              # after each log; an empty text: nothing to say

A curve is a JSON file: what the runs had in common, and the lowest, the median and the highest loss of their windows
of tokens. trainer/reference_curve.py makes it of at least five runs with different seeds. Those that come with Sparrow
are in trainer/run/curves/, and are found by what a run is made of. A run is compared only with runs of the same stage,
data, tokenizer, architecture, optimiser, schedule and length: the loss of others would be another one.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.console import UserError

CURVES = Path(__file__).parent / "curves"
RUNS = 5  # of which a curve is made, at least
PATIENCE = 3  # windows for which a run is outside before it is said
SETTINGS = ("learning_rate", "warmup_steps", "min_lr_ratio", "weight_decay", "grad_clip", "dtype")  # may be wrong
CAUSES = {
    "above": "a learning rate that is too high (the loss jumps) or too low (it hardly falls), damaged or shuffled "
    "data, text that the tokenizer was not made for, too large a batch, fp16 that overflows, a change in the code",
    "below": "better settings, data that repeats itself, a mask through which the model sees what it has to predict",
}

Window = tuple[float, float, float]  # trained tokens at its begin and at its end, mean loss in between


def facts_of(engine) -> dict[str, Any]:
    """What the course of a run's loss depends on, but for its seed; as run.json and curves record it."""
    facts = engine._identity()
    del facts["seed"], facts["token_format"]  # the data's fingerprint has the second
    facts |= {name: getattr(engine.config, name) for name in ("schedule", *SETTINGS)}
    facts |= dict(stage=engine.job.stage, steps=engine.total, examples=engine.loader.examples_per_step)
    facts["dtype"] = str(engine.dtype).removeprefix("torch.")  # the one that is used, not "auto"
    return json.loads(json.dumps(facts))  # as it is read again: tuples become lists


@dataclass(frozen=True)
class Curve:
    """The losses of several runs over their trained tokens."""

    name: str
    facts: dict[str, Any]  # of all runs, see `facts_of`
    seeds: list[int]  # one run each
    tokens: list[int]  # trained tokens at the end of each window; it begins where the one before ends
    low: list[float]  # of the runs' mean losses in the window
    median: list[float]
    high: list[float]

    def band(self, begin: float, end: float) -> tuple[float, float, float]:
        """(lower edge, median, upper edge) of the losses of good runs in these tokens.

        As far above the highest run as the runs are from each other, and as far below the lowest: one more run exceeds
        the highest of five in one window of six. At least 2 % of the loss.
        """
        first, last = bisect_right(self.tokens, begin), bisect_left(self.tokens, end) + 1  # windows in between
        begins, ends = [0, *self.tokens[: last - 1]][first:], self.tokens[first:last]
        low, median, high = (
            mean_loss(list(zip(begins, ends, values[first:last])), begin, end)
            for values in (self.low, self.median, self.high)
        )
        margin = max(high - low, 0.02 * median)
        return low - margin, median, high + margin

    def describe(self) -> str:
        return f"{len(self.seeds)} reference runs ({self.name})"

    def to_json(self) -> str:
        rows = {"seeds", "tokens", "low", "median", "high"}
        lines = [f"{json.dumps(k)}: {json.dumps(v, indent=None if k in rows else 1)}" for k, v in asdict(self).items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def mean_loss(windows: Sequence[Window], begin: float, end: float) -> float:
    """The mean between two numbers of tokens. A window that is only partly in between counts with that part."""
    shares = [(min(end, last) - max(begin, first), loss) for first, last, loss in windows]
    inside = [(share, loss) for share, loss in shares if share > 0]
    return sum(share * loss for share, loss in inside) / sum(share for share, _ in inside)


def read_curve(path: Path) -> Curve:
    """UserError if it is not a curve."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        curve = Curve(**values)
        ends = [0, *curve.tokens]
        bands = list(zip(curve.low, curve.median, curve.high, strict=True))
        sound = len(bands) == len(curve.tokens) > 0 and all(a < b for a, b in zip(ends, ends[1:]))
        sound = sound and all(0 < low <= median <= high < math.inf for low, median, high in bands)
        sound = sound and isinstance(curve.facts, dict) and isinstance(curve.name, str) and len(curve.seeds) > 0
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; trainer/reference_curve.py makes one of your runs") from None
    except (ValueError, TypeError):  # not JSON, or other names or kinds of values
        sound = False
    if not sound:
        raise UserError(f"{path}: not a reference curve; trainer/reference_curve.py makes one of your runs")
    return curve


def find_reference(path: str | None, facts: dict[str, Any]) -> Reference | None:
    """The curve that the user has named, or the one of Sparrow's that is of such runs, if there is one."""
    if path is None:
        curves = map(read_curve, sorted(CURVES.glob("*.json")))
        same = (curve for curve in curves if not differences(curve.facts, facts).keys() - set(SETTINGS))
        return next((Reference(curve, facts) for curve in same), None)
    curve = read_curve(Path(path))
    for name in ("stage", "tokenizer"):
        if curve.facts.get(name) != facts[name]:
            raise UserError(
                f"--reference_curve {path}: its runs have another {name}, and the loss of a token is not the same "
                "there; name a curve of such runs, or leave it out"
            )
    return Reference(curve, facts)


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (theirs, ours)} of what is not the same."""
    names = sorted(theirs.keys() | ours.keys())
    return {name: (theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)}


class Reference:
    """Compares a run with a curve while it logs."""

    def __init__(self, curve: Curve, facts: dict[str, Any]):
        self.curve = curve
        self.differences = differences(curve.facts, facts)
        self.recent: deque[Window] = deque()  # the newest windows of the run, together as long as one of the curve's
        self.end = 0  # tokens at the end of the last one
        self.side, self.since = "", 0.0  # on which side of the band the run is, and from how many tokens on
        self.said: set[str] = set()

    def describe(self) -> str:
        return f"on track? compared with {self.curve.describe()}, up to {self.curve.tokens[-1]:,} tokens; see loss.png"

    def add(self, tokens: int, loss: float | None) -> str:
        """Takes what was logged after so many tokens -> a warning if the run has left the band, once for each side.

        loss  mean since the last log. Single steps are noisy: what is compared is the mean of a whole window
        """
        begin, self.end = self.end, tokens
        if loss is None or not math.isfinite(loss) or not begin < tokens <= self.curve.tokens[-1]:
            return ""
        self.recent.append((begin, tokens, loss))
        window = self.curve.tokens[0]
        while len(self.recent) > 1 and tokens - self.recent[1][0] >= window:
            self.recent.popleft()
        first = self.recent[0][0]
        mean, (low, _, high) = mean_loss(self.recent, first, tokens), self.curve.band(first, tokens)
        side = "above" if mean > high else "below" if mean < low else ""
        if side != self.side:
            self.side, self.since = side, first
        if not side or side in self.said or tokens - self.since < PATIENCE * window:
            return ""
        self.said.add(side)
        return (
            f"warning: the loss, {mean:.3f} after {tokens:,} tokens, is {side} the band of {self.curve.describe()}: "
            f"{low:.3f} to {high:.3f}. {self._what_differs()}Usual causes: {CAUSES[side]}"
        )

    def _what_differs(self) -> str:
        found = []
        for name, (theirs, ours) in self.differences.items():
            plain = not any(isinstance(value, (dict, list)) or len(str(value)) > 20 for value in (theirs, ours))
            found.append(f"{name} {ours} (there {theirs})" if plain else f"another {name}")
        return f"Different in this run: {', '.join(found)}. " if found else ""
