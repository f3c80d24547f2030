"""The tools of the page and of `eval_model.py --tools demo`: what a model writes is computed, never run."""

import datetime
import json
import re

import pytest

from inference.tools import ROUNDS, RUN, TOOLS, calculator, run_tool


@pytest.mark.parametrize(
    "expression, value",
    [
        ("(12 + 3) * 4", "60"),
        ("-2 ** 2", "-4"),  # Python's precedence
        ("2 ** 3 ** 2", "512"),
        ("2 ** -1", "0.5"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("0.1 + 0.2", "0.3"),  # 0.30000000000000004 in floats
        ("1 / 3", "0.3333333333"),
        ("3 - 2 - 1", "0"),
        ("8 / 4 / 2", "1"),
        ("1,000 × 3 ÷ 4 − （1 ^ 5）", "749"),  # as people write it
        (" .5*2. ", "1"),
        ("0 ** 0", "1"),
        ("(-1) ** 100000000000000000001", "-1"),
        ("2 ** 200", str(2**200)),
    ],
)
def test_the_calculator(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression, why",
    [
        ("__import__('os').system('x')", "cannot read"),
        ("9 ** 9 ** 9", "too large"),
        ("(9 ** 99) ** 99", "too large"),
        ("9**300 * 9**300 * 9**300 * 9**300", "too large"),
        ("(" * 31 + "1" + ")" * 31, "more than 30 parentheses"),
        ("2**" * 60 + "1", "parentheses|too large"),
        ("1" * 201, "longer than 200"),
        ("1 / (2 - 2)", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("2 ** 0.5", "whole exponents"),
        ("2 +", "expected a number, found 'the end'"),
        ("(2", "not closed"),
        ("2 3", "cannot read '3'"),
        ("٣ + 1", "cannot read"),  # digits of other scripts
        ("", "expected a number"),
    ],
)
def test_what_cannot_be_computed_is_told_to_the_model(expression, why):
    assert re.match(f"error: .*({why})", run_tool("calculator", {"expression": expression}))


def test_calls_that_a_model_gets_wrong():
    assert run_tool("calculator", '{"expression": "2 + 2"}') == "4"  # arguments as JSON, as in OpenAI's calls
    assert run_tool("system", {}) == "error: there is no tool 'system', only calculator and date"
    assert run_tool("calculator", {"formula": "1"}) == "error: calculator takes expression"
    assert run_tool("date", {"day": 1}) == "error: date takes no arguments"
    for broken in ("{", "[1]", "7", '"x"', "null", "[" * 5000):
        assert run_tool("date", broken).startswith("error: "), broken


def test_the_date():
    today = run_tool("date", {})
    assert datetime.date.fromisoformat(today[:10]) == datetime.date.today()
    assert today.endswith(datetime.date.today().strftime(", %A"))


def test_every_tool_is_described():
    assert [tool["function"]["name"] for tool in TOOLS] == list(RUN) and ROUNDS >= 1
    json.dumps(TOOLS)
