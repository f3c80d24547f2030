"""Two harmless tools to try out what a model does with tools: a calculator and the date.

    encode_chat(tokenizer, messages, TOOLS)                       # the model is told of them
    run_tool("calculator", {"expression": "(12 + 3) * 4"})        # "60", the result that it is told

Nothing that a model writes is run as code: the calculator reads its expression itself.
"""

from __future__ import annotations

import datetime
import json
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

PRODUCTS = {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod}
ROUNDS = 5  # how often an answer may call tools and go on
LONGEST, DEEPEST, BITS = 200, 30, 1000  # characters and parentheses of an expression, size of a number


def _schema(name: str, description: str, **parameters: dict[str, str]) -> dict[str, Any]:
    about = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": about}}


TOOLS = [
    _schema(
        "calculator",
        "Computes an arithmetic expression exactly.",
        expression={"type": "string", "description": "numbers, + - * / // % ** and parentheses, as in (12 + 3) * 4"},
    ),
    _schema("date", "Says today's date and the day of the week."),
]


def run_tool(name: str, arguments: dict[str, Any] | str) -> str:
    """The result. What is wrong with a call is told as its result, so that the model can do better.

    arguments  an object, or its JSON
    """
    if name not in RUN:
        return f"error: there is no tool {name[:50]!r}, only {' and '.join(RUN)}"
    try:
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
        return RUN[name](**given)
    except TypeError:
        wanted = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == name)["parameters"]["required"]
        return f"error: {name} takes {' and '.join(wanted) or 'no arguments'}"
    except (ValueError, ArithmeticError, RecursionError) as error:
        return f"error: {error}"


def date() -> str:
    return f"{datetime.date.today():%Y-%m-%d, %A}"


def calculator(expression: str) -> str:
    """The value, exact if it is whole, else with ten digits. ValueError says what cannot be computed."""
    value = _Parser(str(expression)).value()
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


RUN: dict[str, Callable[..., str]] = {"calculator": calculator, "date": date}


class _Parser:
    """Recursive descent, one method for each precedence, the weakest first. Numbers are fractions, so 0.1 + 0.2 = 0.3.

    ** binds more strongly than a minus before it and groups from the right, as in Python.
    """

    LEXEME = re.compile(r"\s*(\d+\.?\d*|\.\d+|\*\*|//|[-+*/%()])\s*", re.ASCII)
    WRITTEN = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**", "（": "(", "）": ")", "，": None, ",": None})

    def __init__(self, text: str):
        if len(text) > LONGEST:
            raise ValueError(f"the expression is longer than {LONGEST} characters")
        text = text.translate(self.WRITTEN)
        self.rest, at = [], 0
        while at < len(text):
            found = self.LEXEME.match(text, at)
            if found is None:
                raise ValueError(f"cannot read {text[at : at + 20]!r}")
            self.rest.append(found[1])
            at = found.end()
        self.depth = 0

    def value(self) -> Fraction:
        value = self._sum()
        if self.rest:
            raise ValueError(f"cannot read {''.join(self.rest)[:20]!r}")
        return value

    def _take(self, *wanted: str) -> str | None:
        return self.rest.pop(0) if self.rest and self.rest[0] in wanted else None

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while sign := self._take(*PRODUCTS):
            other = self._signed()
            if sign != "*" and other == 0:
                raise ValueError("division by zero")
            value = _bounded(Fraction(PRODUCTS[sign](value, other)))
        return value

    def _signed(self) -> Fraction:
        sign = 1
        while taken := self._take("+", "-"):
            sign = -sign if taken == "-" else sign
        return sign * self._power()

    def _power(self) -> Fraction:
        value = self._atom()
        if not self._take("**"):
            return value
        self._deeper()
        exponent = self._signed()  # 2 ** -1, 2 ** 3 ** 2
        self.depth -= 1
        if exponent.denominator != 1:
            raise ValueError("only whole exponents can be computed")
        if value == 0 and exponent < 0:
            raise ValueError("division by zero")
        size = max(value.numerator.bit_length(), value.denominator.bit_length())
        if abs(exponent) * (size - 1) > BITS:  # before it is computed
            raise ValueError("the number is too large")
        if size <= 1 and exponent:  # 0, 1 and -1, whose exponent may be large
            exponent = exponent % 2 or 2
        return _bounded(value ** int(exponent))

    def _atom(self) -> Fraction:
        if self._take("("):
            self._deeper()
            value = self._sum()
            if not self._take(")"):
                raise ValueError("a parenthesis is not closed")
            self.depth -= 1
            return value
        if not self.rest or not self.rest[0].replace(".", "").isdigit():
            raise ValueError(f"expected a number, found {self.rest[0] if self.rest else 'the end'!r}")
        return Fraction(self.rest.pop(0))

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} parentheses in each other")


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise ValueError("the number is too large")
    return value
