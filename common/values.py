"""The value of one option: converted from what stands in a command line or YAML file, checked, and shown.

convert(specs(Chat)["temperature"], "temp", "5e-1")   # (0.5, None)
"""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

from common.console import UserError

SEEDS = "[0, 9223372036854775808)"  # `within` of every seed: torch takes 64 bits, and ranks or prompts count on from it
EPOCHS, STEPS = "[1, 1000000]", "[0, 1000000000]"  # `within` of passes over the data, and of steps (0: by passes)
LONGEST = 2**31 - 2  # tokens of a row; data sets keep its length, with one more, in 32 bits
MOST_TIMES = 10_000  # that rows may be repeated: more than anybody needs, and memory for all of them
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class Spec(NamedTuple):
    """One option, read from its dataclass field; see `option` in common/options.py for the fields without a comment."""

    name: str
    kind: type  # int, float, str or bool
    many: bool  # tuple[kind, ...]
    optional: bool  # kind | None
    default: Any
    help: str
    aliases: tuple[str, ...]
    choices: tuple[str, ...] | None
    within: str
    path: bool
    switch: tuple[str, str] | None
    hidden: bool  # not in --help: only launchers set it
    owner: type  # the class that introduced it

    def spellings(self) -> list[str]:
        """Its name, then its aliases."""
        return [self.name, *(alias.partition("=")[0] for alias in self.aliases)]

    def stands_for(self, spelling: str) -> list[str] | None:
        """[value if on, value if off] of an alias that is a switch: ["bfloat16", "float32"] for bf16. Else None."""
        return next((a.partition("=")[2].split("|") for a in self.aliases if a.startswith(spelling + "=")), None)


def convert(spec: Spec, spelling: str, raw: Any) -> tuple[Any, Any]:
    """(value, denied). `raw` is text, or what YAML made of it; UserError says what was expected instead.

    denied  of a switch that is off, the value that it rules out: `--bf16 0` gives ("float32", "bfloat16"). Else None.
    """
    word = raw[0] if isinstance(raw, list) and len(raw) == 1 else raw
    if str(word).lower() in ("none", "null"):
        if spec.optional:
            return None, None
        if spec.many and spec.default == ():
            return (), None
    if raw is None or raw == "":
        raise UserError("needs a value")
    if stands_for := spec.stands_for(spelling):
        on, off = stands_for
        return (on, None) if truth(raw) else (off, on)
    if not spec.many:
        return _scalar(spec, raw), None
    items = raw if isinstance(raw, list) else [raw]
    if "" in items:
        raise UserError("needs a value")
    if not spec.path:
        items = [part.strip() for item in items for part in str(item).split(",")]
    return tuple(_scalar(spec, item) for item in items), None


def _scalar(spec: Spec, raw: Any) -> Any:
    """One value of the option's own type."""
    if isinstance(raw, (dict, list)):
        raise UserError("expected a single value")
    if spec.kind is bool:
        return truth(raw)
    if spec.kind is str:
        if spec.switch and str(raw).lower() in YES + NO:
            return spec.switch[0] if truth(raw) else spec.switch[1]
        if isinstance(raw, bool):
            raise UserError("YAML reads this word as true or false; put it in quotes")
        text = (spec.stands_for(str(raw)) or [str(raw)])[0]  # --dtype bf16
        text = os.path.abspath(os.path.expanduser(text)) if spec.path else text
        if any("\ud800" <= character <= "\udfff" for character in text):  # Python's stand-ins for other bytes
            raise UserError(
                "bytes that are not UTF-8, and paths are written into files that are; rename the file or folder. If "
                "its name is UTF-8, the system's encoding is another one: set PYTHONUTF8=1"
            )
        return text
    return _number(raw, whole=spec.kind is int)


def _number(raw: Any, whole: bool) -> float | int:
    """Numbers are read here even from YAML: YAML 1.1 takes 5e-4, which has no dot, for text."""
    expected = "expected a whole number" if whole else "expected a number"
    if isinstance(raw, bool):
        raise UserError(expected)
    try:
        if whole and isinstance(raw, str) and raw.strip("+-").isdigit():
            return int(raw)  # not by way of a float, which has 53 bits
        number = float(raw)
    except (TypeError, ValueError, OverflowError):
        raise UserError(expected) from None
    if not math.isfinite(number) or whole and number != int(number):
        raise UserError(expected)
    return int(number) if whole else number


def truth(raw: Any) -> bool:
    """A word for true or false, whatever its case."""
    word = str(raw).lower()
    if word not in YES + NO:
        raise UserError("say true or false (1 or 0, yes or no, on or off)")
    return word in YES


def is_off(raw: Any) -> bool:
    """Whether it is a word for false; any other text is not."""
    return str(raw).lower() in NO


def inside(value: float, within: str) -> bool:
    """Whether a number lies in an interval that is written as in mathematics: inside(0, "(0, 1]") is False."""
    low, high = (float(bound) for bound in within[1:-1].split(","))
    return low < value < high or value == low and within[0] == "[" or value == high and within[-1] == "]"


def interval_in_words(within: str) -> str:
    """ "[1, inf)" -> "at least 1", as in "must be at least 1"."""
    low, high = (bound.strip() for bound in within[1:-1].split(","))
    return f"in {within}" if high != "inf" else f"at least {low}" if within[0] == "[" else f"above {low}"


def as_typed(raw: Any) -> str:
    """A value that was not converted, for a message: the words of a list as they stand in YAML."""
    return f"[{', '.join(map(as_typed, raw))}]" if isinstance(raw, list) else str(raw)


def with_places(problem: str, places: dict[str, str]) -> str:
    """A problem, named by the places in a file that set the options instead of their flags: "my.yaml: epochs 0: must
    be at least 1". Flags in the advice after the colon stay. places: option -> where in the file."""
    about, colon, advice = problem.partition(":")
    return re.sub(r"--(\w+)", lambda flag: places.get(flag[1], flag[0]), about) + colon + advice


def show(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ",".join(show(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
