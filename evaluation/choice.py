"""Multiple choice by likelihood: which of the options does the model find likeliest after the question?

    questions = read_choices("college_physics_val.csv")      # C-Eval, CMMLU, MMLU (CSV); MMLU, ARC (JSONL)
    rows = score(model, tokenizer, questions)                # {"choice": (n, 2), "choice_norm": ..., "letter": ...}

Three ways to choose, each usual somewhere: `choice` by the log-likelihood of the option's text; `choice_norm` by the
same per byte, so that long options are not at a disadvantage (lm-evaluation-harness's acc and acc_norm); `letter` by
that of A, B, C or D after a prompt that lists the options (C-Eval's, CMMLU's and MMLU's own way). A model that chats
gets the question as a user's turn, and the end of its answer counts too; other models continue a text. Examples, if
there are any, stand before the question: as earlier turns, or in the same text.
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.console import UserError
from dataset.read.jsonl import require_file
from dataset.read.parse import read_text
from dataset.read.questions import read_rows
from evaluation.likelihood import log_likelihoods
from inference.answers import prompt_ids
from inference.health import language
from model.transformer import CausalLM
from tokenizer.chat import Encoded, encode_chat
from tokenizer.text import Tokenizer

LETTERS = tuple(string.ascii_uppercase)  # not one string: "BC" would be "in" it
WORDS = {"zh": ("问题：{}\n", "答案："), "en": ("Question: {}\n", "Answer:")}
WAYS = ("choice", "choice_norm", "letter")


@dataclass(frozen=True)
class Choice:
    where: str  # file:line
    question: str
    options: tuple[str, ...]
    right: int  # the number of the right one

    @property
    def listed(self) -> str:
        """The question with its options below, a letter before each."""
        return "\n".join([self.question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, self.options))])


def read_choices(path: str | Path, limit: int = 0) -> list[Choice]:
    """UserError with file:line for a row that is not multiple choice, or that has no right answer."""
    path, found = require_file(path), []
    rows = _csv_rows(path) if path.suffix.lower() in (".csv", ".tsv") else read_rows(path)
    for where, row in rows:
        choice = as_choice(row, where) if isinstance(row, dict) else None
        if choice is None:
            raise UserError(f"{where}: no multiple choice: expected a question, its options and the right one")
        found.append(choice)
        if len(found) == limit:
            break
    if not found:
        raise UserError(f"{path}: there is no question in it")
    return found


def read_examples(path: str | Path, count: int) -> list[Choice]:
    """The first `count` solved questions that belong to a file: of C-Eval's val/physics_val.csv those in
    dev/physics_dev.csv, of CMMLU's test/anatomy.csv those in dev/anatomy.csv. UserError if there are not so many."""
    path = Path(path)
    name = re.sub("_(val|test)$", "", path.stem)
    names = [f"{name}_dev{path.suffix}", f"{name}{path.suffix}"]
    places = [folder / own for own in names for folder in (path.parent, path.parent.parent / "dev")]
    file = next((place for place in places if place.is_file() and place.resolve() != path.resolve()), None)
    if file is None:
        raise UserError(f"--num_fewshot {count}: {path} has no examples; put them into {places[0]} or {places[1]}")
    found = read_choices(file, count)
    if len(found) < count:
        raise UserError(f"--num_fewshot {count}: {file} has only {len(found)} questions")
    return found


def as_choice(row: dict, where: str) -> Choice | None:
    """The row as multiple choice, or None if it is something else."""
    low = {str(key).strip().lower(): value for key, value in row.items()}
    question = low.get("question", low.get("query"))
    options = low.get("choices", low.get("options"))
    labels: Sequence[str] = LETTERS
    if isinstance(question, dict):  # ARC's own files
        question, options = question.get("stem"), question.get("choices", options)
    if isinstance(options, dict):  # ARC as on the hub: {"text": [...], "label": [...]}
        labels, options = options.get("label", LETTERS), options.get("text")
    if options is None and {"a", "b"} <= low.keys():
        labels = [letter for letter in LETTERS if low.get(letter.lower()) not in (None, "")]
        options = [low[letter.lower()] for letter in labels]
    if isinstance(options, list) and options and all(isinstance(option, dict) for option in options):
        labels, options = [option.get("label") for option in options], [option.get("text") for option in options]
    if not isinstance(question, str) or not isinstance(options, (list, tuple)):
        return None
    if len(options) > len(LETTERS):
        raise UserError(f"{where}: {len(options)} options, and there are only {len(LETTERS)} letters for them")
    given = next((low[key] for key in ("answerkey", "answer", "gold", "label", "target") if key in low), None)
    right = _number(given, list(labels)[: len(options)], options)
    if right is None:
        hint = "; C-Eval and ARC give the answers of their validation files" if given in (None, "") else ""
        raise UserError(f"{where}: the right option is {given!r}, and the options are {len(options)}{hint}")
    return Choice(where, question.strip(), tuple(str(option).strip() for option in options), right)


def _number(given: object, labels: list, options: Sequence) -> int | None:
    """Which option is meant: a label, a letter, the option itself, or a number from 0. A text that is both, as "3" is
    among 2, 3, 4 and 5, is the option."""
    text = str(given).strip()
    for names in ([str(label).strip().upper() for label in labels], LETTERS[: len(options)]):
        if text and text.upper() in names:
            return names.index(text.upper())
    texts = [str(option).strip() for option in options]
    if isinstance(given, str) and texts.count(text) == 1:
        return texts.index(text)
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    return texts.index(text) if text in texts else None


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """MMLU's files have no line of names: question, A, B, C, D, answer."""
    text = read_text(path)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    names: list[str] = []
    for row in _readable(lines, path):
        where = f"{path}:{lines.line_num}"
        if not any(cell.strip() for cell in row):
            continue
        if not names and "question" in [cell.strip().lower() for cell in row]:
            names = [cell.strip() for cell in row]
            continue
        names = names or ["question", *LETTERS[: len(row) - 2], "answer"]
        if len(row) != len(names):
            raise UserError(f"{where}: {len(row)} columns, where the first line has {len(names)}")
        yield where, dict(zip(names, row))


def _readable(lines: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from lines
    except csv.Error as error:  # a cell of more than 128 KiB: a quotation mark that nothing closes
        raise UserError(f"{path}:{lines.line_num}: {error}; is a quotation mark above not closed?") from None


def score(
    model: CausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Choice],
    *,
    chats: bool = True,
    examples: Sequence[Choice] = (),
    system: str = "",
) -> dict[str, np.ndarray]:
    """{way: (n, 2)}: whether the way finds the right option, and 1, for each question; 0 and 0 where the model has
    fewer positions than that takes.

    chats: with a chat template, and the system prompt if there is one. examples: solved questions that are shown before
    each.
    """
    encode = partial(_chat_row, system=system) if chats else _text_row
    solved = [(example.question, example.options[example.right]) for example in examples]
    lettered = [(example.listed, LETTERS[example.right]) for example in examples]
    rows = [encode(tokenizer, [*solved, (q.question, option)]) for q in questions for option in q.options]
    letters_of = lambda q: LETTERS[: len(q.options)]
    rows += [encode(tokenizer, [*lettered, (q.listed, letter)]) for q in questions for letter in letters_of(q)]
    fits = np.array([len(row.ids) - 1 <= model.config.max_position_embeddings for row in rows])
    rows = [row if fit else Encoded([0], [False]) for row, fit in zip(rows, fits)]
    sums = np.array([logp.sum(dtype=np.float64) for logp in log_likelihoods(model, rows, progress="options")])
    sums[~fits] = np.nan
    texts, letters = np.split(sums, 2)
    found = {way: np.zeros((len(questions), 2)) for way in WAYS}
    begin = 0
    for n, q in enumerate(questions):
        own = slice(begin, begin + len(q.options))
        sizes = np.array([max(len(option.encode()), 1) for option in q.options])
        begin = own.stop
        for way, scores in zip(WAYS, (texts[own], texts[own] / sizes, letters[own])):
            if np.isfinite(scores).all():
                found[way][n] = scores.argmax() == q.right, 1
    return found


def _chat_row(tokenizer: Tokenizer, shown: list[tuple[str, str]], system: str = "") -> Encoded:
    """shown: questions with their answers; of the last answer the likelihood counts."""
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in shown:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "train": False}]
    del turns[-1]["train"]
    return encode_chat(tokenizer, turns)


def _text_row(tokenizer: Tokenizer, shown: list[tuple[str, str]]) -> Encoded:
    """The option is what comes after the ids of the prompt, as in lm-evaluation-harness."""
    chinese = language(shown[-1][0]) == "zh"
    asks, answers = WORDS["zh" if chinese else "en"]
    space = "" if chinese else " "
    solved = "".join(asks.format(question) + answers + space + answer + "\n\n" for question, answer in shown[:-1])
    question, option = shown[-1]
    before = solved + asks.format(question) + answers
    ids = prompt_ids(tokenizer, before + space + option)
    known = min(len(prompt_ids(tokenizer, before)), len(ids) - 1)
    return Encoded(ids, [i >= known for i in range(len(ids))])
