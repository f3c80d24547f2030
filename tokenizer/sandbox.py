"""Where chat templates of others run: Jinja's sandbox, with an end.

A template comes with somebody's weights and is a program. The sandbox keeps it away from attributes and from changing
what it is given, but lets it loop for hours or print gigabytes. So every turn of a loop, call, filter and operator is a
step here, and steps and the sizes of texts have limits. Who exceeds one gets a `TemplateError`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LARGEST_TEMPLATE = 1_000_000  # characters; published ones have up to 20,000
STEPS = 1_000_000  # of one conversation; one of 1,000 turns takes some 20,000
LARGEST_TEXT = 50_000_000  # characters of one value, and of what is printed
LARGEST_NUMBER = 10_000  # bits
# Filters that make no text of what they are given
PASSES_ON = frozenset(
    "length count first last list map select selectattr reject rejectattr items default d batch slice sort unique "
    "groupby dictsort min max sum reverse random attr _each".split()
)
WIDENS = frozenset("center indent wordwrap truncate batch slice urlize".split())  # by a number they are given


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which templates tell transformers what to train on. Here it only
    prints what is inside, since foreign.py finds that without. As in transformers, what is set inside ends with it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        tag = next(parser.stream)
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=tag.lineno)


class Bounded(ImmutableSandboxedEnvironment):
    """Compile with `from_string`, then call `render_bounded`."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
            finalize=self._weighed,  # what {{ }} prints
        )
        self.steps = 0
        for name in ("lipsum", "cycler", "joiner"):  # not for chats
            del self.globals[name]
        self.globals["raise_exception"] = refuse
        self.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        own = {"tojson": _to_json, "_each": self._each, "_joined": self._joined}
        self.filters = {name: self._bounded(name, function) for name, function in (self.filters | own).items()}

    def from_string(self, source: str, *_args, **_options) -> jinja2.Template:
        """TemplateError: it is too large, or not a template."""
        if len(source) > LARGEST_TEMPLATE:
            refuse(f"{len(source):,} characters long, which no chat needs")
        try:
            return super().from_string(source)
        except (RecursionError, MemoryError, SyntaxError, OverflowError) as error:  # nested too deeply for Python
            raise jinja2.TemplateError(f"cannot be compiled ({type(error).__name__})") from None

    def render_bounded(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        self.steps, size, found = 0, 0, []
        for piece in template.generate(values):
            size += len(piece)
            check_size(size)
            found.append(piece)
        return "".join(found)

    # ---- every loop goes through `_each`, every ~ through `_joined`

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter(loop.iter, "_each")
        return _Joins().visit(tree)

    def _each(self, items: Iterable) -> Iterator:
        for item in items:
            self._step()
            yield item

    @staticmethod
    def _joined(pieces: list) -> str:
        return "".join(map(str, pieces))

    # ---- the rest asks the environment

    def call(self, context, obj, /, *args, **kwargs):  # type: ignore[override]
        owner = getattr(obj, "__self__", None)
        self._step(owner, *args)
        if isinstance(owner, str):  # center, ljust, ...
            _check_widths(args)
        return self._sized(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value):
        """What the sandbox makes of "...".format: it checks attributes, and here widths too."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args, **kwargs):
            _check_format(value.__self__)
            return wrapped(*args, **kwargs)

        return checked

    def _bounded(self, name: str, function):
        @functools.wraps(function)  # Jinja notes in its attributes which filters want the environment
        def bounded(*args, **kwargs):
            self._step(*args)
            if name not in PASSES_ON:
                for value in args:
                    self._weighed(value)
            if name in WIDENS:
                _check_widths((*args, *kwargs.values()))
            if name == "format":
                _check_format(str(args[0]))
            return self._sized(function(*args, **kwargs))

        return bounded

    def call_binop(self, context, operator, left, right):  # type: ignore[override]
        self._step(left, right)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LARGEST_NUMBER:
                refuse("it makes a number that no chat needs")
        elif operator == "*":
            sides = [len(side) if isinstance(side, (str, list, tuple)) else side for side in (left, right)]
            check_size(abs(sides[0] * sides[1]))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return self._sized(super().call_binop(context, operator, left, right))

    def _step(self, *values: Any) -> None:
        """values: what is worked on; long ones are several steps."""
        sized = (len(value) for value in values if isinstance(value, (str, list, tuple, dict, range)))
        self.steps += 1 + sum(sized) // 100
        if self.steps > STEPS:
            refuse(f"it does not end within {STEPS:,} steps")

    @staticmethod
    def _sized(value: Any) -> Any:
        if isinstance(value, (str, list, tuple)):
            check_size(len(value))
        return value

    @staticmethod
    def _weighed(value: Any) -> Any:
        """A list of lists can be small and still be a gigabyte as text, if the same list stands in it many times."""
        if isinstance(value, (list, tuple, dict)):
            check_size(_weight(value, {}))
        return value


def _to_json(value: Any, **options) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def check_size(size: float) -> None:
    if size > LARGEST_TEXT:
        refuse(f"it makes a text of more than {LARGEST_TEXT:,} characters")


def _weight(value: Any, known: dict[int, int]) -> int:
    """About how many characters it is as text; each list is looked at once."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, tuple, dict)):
        return 1
    if id(value) not in known:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_weight(part, known) for part in parts)
    return known[id(value)]


def _check_widths(values: Iterable) -> None:
    for value in values:
        if isinstance(value, int):
            check_size(abs(value))


def _check_format(text: str) -> None:
    if re.search(r"\d{7}", text):
        refuse("a format wider than any chat needs")


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Joins(NodeTransformer):
    """a ~ b ~ c becomes [a, b, c] | _joined."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_joined")
