"""Figures that a loss hides: do answers end, do they repeat themselves, are they in the language of the question?

    health([Answer(...), ...], questions=["你好吗?", ...], references=["很好。", ...])
    # {"answers": 2, "ended": 0.5, "empty": 0.0, "rep_4": 0.12, "distinct_1": 0.4, ...}; what cannot be said is left out

A word is a run of letters or digits; in Chinese, where nothing stands between words, a character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from inference.answers import Answer

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")
LATIN = re.compile(r"[A-Za-z]+")
TAGS = ("think", "answer", "tool_call")

MEANING = {
    "answers": "answers looked at",
    "ended": "end by themselves; the others were cut off",
    "empty": "say nothing",
    "rep_4": "of four words in a row, the share said before in the same answer",
    "distinct_1": "different words / all words, of all answers together",
    "distinct_2": "the same of two words in a row",
    "wrong_language": "Chinese where English was expected, or the reverse",
    "tags_closed": "close every <think>, <answer> and <tool_call> that they open",
    "length_ratio": "words of the answers / words of the references",
    "no_room": "questions that fill the model's positions, and get no answer",
}


def health(
    answers: Sequence[Answer], questions: Sequence[str] | None = None, references: Sequence[str] | None = None
) -> dict[str, float]:
    """{name: figure} for the names in MEANING, shares of the answers unless it says otherwise.

    The language that is expected is that of the reference or, without one, of the question.
    """
    figures: dict[str, float] = {"answers": len(answers)}
    asked = [i for i, answer in enumerate(answers) if answer.asked]
    said = [words(answers[i].text) for i in asked]
    figures["ended"] = _share(answers[i].ended for i in asked)
    figures["empty"] = _share(not answers[i].text for i in asked)
    figures["rep_4"] = _mean([repetition(own, 4) for own in said if len(own) >= 4])
    for n in (1, 2):
        grams = [gram for own in said for gram in ngrams(own, n)]
        figures[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else float("nan")
    expected = references or questions
    if expected:
        pairs = [(language(expected[i]), language(answers[i].text)) for i in asked]
        figures["wrong_language"] = _share(a != b for a, b in pairs if a and b)
    figures["tags_closed"] = _share(tags_closed(answers[i].full) for i in asked if "<" in answers[i].full)
    if references:
        wanted = sum(len(words(references[i])) for i in asked)
        figures["length_ratio"] = sum(map(len, said)) / wanted if wanted else float("nan")
    figures["no_room"] = len(answers) - len(asked) or float("nan")
    return {name: round(value, 6) for name, value in figures.items() if value == value}


def words(text: str) -> list[str]:
    """In lower case."""
    return WORD.findall(text.lower())


def ngrams(units: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def repetition(units: Sequence[str], n: int) -> float:
    """1 - different n-grams / n-grams (seq-rep-n of arXiv:1908.04319, section 6): 0 if none is said twice."""
    grams = ngrams(units, n)
    return 1 - len(set(grams)) / len(grams)


def language(text: str) -> str | None:
    """zh or en, by which of Chinese characters and Latin words there are more of; None if there are none."""
    chinese, latin = len(re.findall(f"[{HAN}]", text)), len(LATIN.findall(text))
    return None if chinese == latin == 0 else "zh" if chinese >= latin else "en"


def tags_closed(text: str) -> bool:
    """Whether each tag is closed as often as it is opened, and never before."""
    for tag in TAGS:
        depth = 0
        for found in re.findall(f"</?{tag}>", text):
            depth += -1 if found[1] == "/" else 1
            if depth < 0:
                return False
        if depth:
            return False
    return True


def _share(marks) -> float:
    return _mean([float(mark) for mark in marks])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
