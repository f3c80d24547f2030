"""Votes of people, and whether they prefer one of the models. Saved by the page of scripts/compare_models.py, or by the
server's page /compare.

    votes = read_votes("votes.json", result)
    print(as_text(tally(votes, names), names))

A vote is about one question and two models, {"question": 3, "left": 0, "right": 1, "choice": "left" | "right" | "tie"}.
Who votes blind does not see which model stands on which side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from common.console import UserError
from evaluation.statistics import sign_test

FORMAT = "sparrow-votes-1"
OF_THE_PAGE = "page"  # in place of a comparison's id
CHOICES = ("left", "right", "tie")


def read_votes(path: str | Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The votes in a file. UserError if it is something else, or about another comparison than `result`."""
    content = _read(path)
    if content["report"] != result["id"]:
        raise UserError(f"{path}: these votes are about other answers than this comparison's; name its own --output")
    return _checked(path, content["votes"], len(result["models"]), len(result["questions"]))


def read_page_votes(paths: Iterable[str | Path]) -> tuple[list[str], list[dict[str, Any]]]:
    """(names of the models, votes) of files that the server's page has saved. Each names its models itself; the same
    name in two files is the same model."""
    names: dict[str, int] = {}
    votes = []
    for path in paths:
        content = _read(path)
        if content["report"] != OF_THE_PAGE:
            raise UserError(f"{path}: these votes are about a comparison; name it with --output")
        own, questions = content.get("models"), content.get("questions")
        if (
            not isinstance(own, list)
            or not all(isinstance(name, str) for name in own)
            or not isinstance(questions, list)
        ):
            raise UserError(f"{path}: does not say which models and questions the votes are about; save them again")
        for vote in _checked(path, content["votes"], len(own), len(questions)):
            sides = {side: names.setdefault(own[vote[side]], len(names)) for side in ("left", "right")}
            votes.append(vote | sides)
    return list(names), votes


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT or not isinstance(content["report"], str):
            raise KeyError
        return content | {"votes": [dict(vote) for vote in content["votes"]]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not votes that the page of a comparison has saved") from None


def _checked(path: str | Path, votes: list[dict[str, Any]], models: int, questions: int) -> list[dict[str, Any]]:
    try:
        fine = all(_is_vote(vote, models, questions) for vote in votes)
    except (KeyError, TypeError):
        raise UserError(f"{path}: not votes that the page of a comparison has saved") from None
    if not fine:
        raise UserError(f"{path}: a vote in it names a question or a model that the comparison does not have")
    return votes


def _is_vote(vote: dict[str, Any], models: int, questions: int) -> bool:
    left, right = vote["left"], vote["right"]
    return (
        vote["choice"] in CHOICES
        and vote["question"] in range(questions)
        and isinstance(left, int)
        and isinstance(right, int)
        and left in range(models)
        and right in range(models)
        and left != right
    )


def tally(votes: Sequence[dict[str, Any]], models: int) -> list[dict[str, Any]]:
    """Of each two models: how often each was preferred, ties, and p of the sign test (ties are left out of it)."""
    rows = []
    for a, b in combinations(range(models), 2):
        wins, ties = {a: 0, b: 0}, 0
        for vote in votes:
            if {vote["left"], vote["right"]} == {a, b}:
                if vote["choice"] == "tie":
                    ties += 1
                else:
                    wins[vote[vote["choice"]]] += 1
        if wins[a] + wins[b] + ties:
            rows.append(dict(a=a, b=b, wins_a=wins[a], wins_b=wins[b], ties=ties, p=sign_test(wins[a], wins[b])))
    return rows


def as_text(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    if not rows:
        return "no votes"
    lines = []
    for row in rows:
        a, b = names[row["a"]], names[row["b"]]
        lines.append(
            f"{a} preferred {row['wins_a']} times, {b} {row['wins_b']} times, {row['ties']} ties: {verdict(row)}"
        )
    return "\n".join(lines)


def verdict(row: dict[str, Any]) -> str:
    """What the sign test says, in words."""
    decided = row["wins_a"] + row["wins_b"]
    if not decided:
        return "no side was preferred"
    clear = "more than chance explains" if row["p"] < 0.05 else "chance alone explains as much"
    return f"{clear} (sign test of {decided}, p = {row['p']:.3g})"
