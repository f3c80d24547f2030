"""Measures a model on a file: likelihoods, generated answers against references, multiple choice; and always the health
of what it generates.

    found = measure(model, tokenizer, "val.jsonl", chosen(["ppl", "bleu"]), Settings(max_new_tokens=256))
    found.figure("ppl")                       # Figure(value=12.3, low=11.9, high=12.7, rows=500)
    print(table([found]))                     # evaluation/report.py

What a file holds decides what can be measured: documents, questions with or without answers, pairs, multiple choice.
What a metric counts of each row is kept (`counts`), so that two models can be compared row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import UserError
from dataset.read.formats import layout_of
from dataset.read.jsonl import require_file
from dataset.read.parse import read_text
from dataset.read.questions import Question, read_questions, read_rows, references_of
from evaluation.choice import read_choices, read_examples, score
from evaluation.likelihood import PART, WINDOW, log_likelihoods, totals, totals_by_part, windows
from evaluation.metrics import METRICS, to_install
from evaluation.statistics import bootstrap
from inference.answers import GREEDY, Answer, answers_to_ids, prompt_ids
from inference.health import health
from inference.sampling import Sampling
from model.transformer import CausalLM
from tokenizer.chat import Encoded, encode_chats
from tokenizer.text import Tokenizer

OF_KIND = {  # what a file holds -> what can be measured with it
    "text": ("likelihood",),
    "questions": ("likelihood", "answers", "pairs"),
    "choice": ("choice",),
}


@dataclass(frozen=True)
class Settings:
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    window: int = WINDOW  # tokens of a document that are read together
    limit: int = 0  # rows of each file that are used (0: all)
    num_fewshot: int = 0  # solved questions that are shown before each one of multiple choice
    chats: bool = True  # False: questions are texts that the model continues
    system: str = ""
    enable_thinking: bool | None = None


class Figure(NamedTuple):
    value: float
    low: float | None  # of the 95 % interval; None where it cannot be said
    high: float | None
    rows: int


@dataclass
class Measured:
    """What was found out about a model on one file."""

    path: str
    kind: str  # a key of OF_KIND
    rows: int = 0
    counts: dict[str, np.ndarray] = field(default_factory=dict)  # metric -> what it counts of each row, (n, k)
    labels: dict[str, list[str]] = field(default_factory=dict)  # metric -> the line of each of these rows
    how: dict[str, str] = field(default_factory=dict)  # metric -> how it was counted
    health: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    answers: list[dict] = field(default_factory=list)

    def add(self, name: str, counts: np.ndarray, wheres: Sequence[str], how: str = "") -> None:
        self.counts[name] = counts
        self.labels[name] = [where.removeprefix(f"{self.path}:") for where in wheres]
        self.how[name] = how

    def figure(self, name: str) -> Figure:
        return figure(name, self.counts[name])


def figure(name: str, counts: np.ndarray) -> Figure:
    value = METRICS[name].value
    low, high = bootstrap(value, counts) or (None, None)
    return Figure(value(counts.sum(0)), low, high, len(counts))


def measure(
    model: CausalLM,
    tokenizer: Tokenizer,
    path: str | Path,
    metrics: Sequence[str] = (),
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> Measured:
    """metrics: names, as `chosen` gives them; none: all that the file allows. Those that it does not are noted."""
    path = require_file(path)
    found = Measured(str(path), kind_of(path))
    names = [name for name in metrics or _usual(found) if METRICS[name].of in OF_KIND[found.kind]]
    if left := [name for name in metrics if name not in names]:
        found.notes.append(f"{', '.join(left)}: not for {_in_words(found.kind)}")
    if packages := "" if metrics else to_install(names):
        names = [name for name in names if not to_install([name])]
        found.notes.append(f"BLEU or ROUGE left out: pip install {packages}")
    by_kind = {"text": _measure_text, "questions": _measure_questions, "choice": _measure_choices}
    by_kind[found.kind](model, tokenizer, found, names, settings)
    return found


def kind_of(path: Path) -> str:
    """What a file holds: a key of OF_KIND. Its first row decides."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "choice"
    if suffix not in (".json", ".jsonl"):
        return "text"
    first = next(read_rows(path), ("", None))[1]
    if isinstance(first, dict):
        layout = layout_of(first)
        if layout and layout.kind == "text":
            return "text"
        named = [key.lower() for key, value in first.items() if value is not None]
        if any(key in ("choices", "options", "a") for key in named) or isinstance(first.get("question"), dict):
            return "choice"
    return "questions"


def _usual(found: Measured) -> list[str]:
    """What is measured if nobody says: numbers only where the file marks them as GSM8K does, with ####."""
    first = next(read_rows(found.path), ("", None))[1] if found.kind == "questions" else None
    return [name for name in METRICS if METRICS[name].usual and (name != "number" or "####" in str(first))]


def _in_words(kind: str) -> str:
    return {"text": "documents", "questions": "questions", "choice": "multiple choice"}[kind]


# ---- documents


def _measure_text(model: CausalLM, tokenizer: Tokenizer, found: Measured, names: list[str], settings: Settings) -> None:
    texts = _documents(found, settings.limit)
    length = min(settings.window, model.config.max_position_embeddings)
    rows, owners = [], []
    for where, text in texts:
        parts = windows(tokenizer, text, length)
        rows += parts
        owners += [where] * len(parts)
    logp = log_likelihoods(model, rows, progress="documents")
    if len(texts) > 1:  # a document is what is drawn for the error bars; of a single one, its parts
        numbers = {where: n for n, (where, _) in enumerate(texts)}
        sums = np.zeros((len(texts), 3))
        np.add.at(sums, [numbers[owner] for owner in owners], totals(tokenizer, rows, logp))
        owners = list(numbers)
    else:
        sums = totals_by_part(tokenizer, rows, logp)
        owners = [f"{owners[0]} from byte {n * PART}" for n in range(len(sums))]
    found.rows = len(texts)
    for name in names:
        found.add(name, sums, owners, f"windows of {length}" + _of_tokenizer(name, tokenizer))


def _documents(found: Measured, limit: int) -> list[tuple[str, str]]:
    path = Path(found.path)
    if path.suffix.lower() not in (".json", ".jsonl"):
        texts = [(f"{path}:1", read_text(path).replace("\r\n", "\n"))]
    else:
        texts = []
        for where, row in read_rows(path):
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{where}: no text in this row, and the first row of the file has one")
            texts.append((where, text))
            if len(texts) == limit:
                break
    kept = [(where, text) for where, text in texts if text.strip()]
    if not kept:
        raise UserError(f"{path}: there is no text in it")
    if len(kept) < len(texts):
        found.notes.append(f"{len(texts) - len(kept):,} empty documents left out")
    return kept


def _of_tokenizer(name: str, tokenizer: Tokenizer) -> str:
    return f", tokens of a vocabulary of {tokenizer.vocab_size:,}" if name == "ppl" else ""


# ---- questions


def _measure_questions(
    model: CausalLM, tokenizer: Tokenizer, found: Measured, names: list[str], settings: Settings
) -> None:
    questions = read_questions(found.path, settings.limit)
    found.rows = len(questions)
    wanted = {METRICS[name].of for name in names}
    if "likelihood" in wanted or "pairs" in wanted:
        rated = [name for name in names if METRICS[name].of != "answers"]
        _likelihoods(model, tokenizer, found, rated, questions, settings.system)
    graded = [name for name in names if METRICS[name].of == "answers"]
    if graded:
        said = answer_questions(model, tokenizer, questions, settings)
        _grade(found, graded, questions, said)


def _likelihoods(
    model: CausalLM, tokenizer: Tokenizer, found: Measured, names: list[str], questions: list[Question], system: str
) -> None:
    """Of the answers in the file, as in training: every assistant's turn counts."""
    known = [q for q in questions if q.answer]
    pairs = [n for n, q in enumerate(known) if q.rejected] if "preference" in names else []
    chats = [(q.conversation, q.tools) for q in known] + [(known[n].rejected or [], known[n].tools) for n in pairs]
    encoded = encode_chats(tokenizer, [(with_system(messages, system), tools) for messages, tools in chats])
    limit = model.config.max_position_embeddings
    fits = [isinstance(row, Encoded) and any(row.trained[1:]) and len(row.ids) <= limit + 1 for row in encoded]
    nothing = Encoded([0], [False])
    rows = [row if ok and isinstance(row, Encoded) else nothing for row, ok in zip(encoded, fits)]
    sums = totals(tokenizer, rows, log_likelihoods(model, rows, progress="likelihoods"))
    kept = [n for n in range(len(known)) if fits[n]]
    if left := len(known) - len(kept):
        found.notes.append(
            f"{left:,} rows without likelihood: longer than {limit:,} tokens, or nothing to score in them"
        )
    for name in (name for name in names if METRICS[name].of == "likelihood"):
        if kept:
            wheres = [known[n].where for n in kept]
            found.add(name, sums[kept], wheres, "answers of the file" + _of_tokenizer(name, tokenizer))
        else:
            found.notes.append(f"{name}: no row of {found.path} has an answer")
    both = [(n, rejected) for rejected, n in enumerate(pairs, len(known)) if fits[n] and fits[rejected]]
    if both:
        likelier = np.array([[sums[chosen, 0] < sums[rejected, 0], 1.0] for chosen, rejected in both])
        found.add("preference", likelier, [known[n].where for n, _ in both])


def answer_questions(
    model: CausalLM, tokenizer: Tokenizer, questions: Sequence[Question], settings: Settings
) -> list[Answer]:
    """The model's answers, in the order of the questions."""
    asked = [with_system(q.messages, settings.system) if settings.chats else q.asked for q in questions]
    thinks = settings.enable_thinking if settings.chats else None
    prompts = [
        prompt_ids(tokenizer, own, q.tools if settings.chats else None, thinks) for own, q in zip(asked, questions)
    ]
    return answers_to_ids(model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, sampling=settings.sampling)


def with_system(messages: list[dict], system: str) -> list[dict]:
    """With this system prompt, unless the conversation has one."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _grade(found: Measured, names: list[str], questions: list[Question], said: list[Answer]) -> None:
    """Compares answers with their references, and looks at their health."""
    known = [n for n, q in enumerate(questions) if q.references]
    if known:
        replies, references = [said[n].text for n in known], [questions[n].references for n in known]
        for name in names:
            count = METRICS[name].count
            assert count
            counts, how = count(replies, references)
            found.add(name, counts, [questions[n].where for n in known], how)
    if left := len(questions) - len(known):
        found.notes.append(f"{left:,} of {len(questions):,} questions have no reference: not in {', '.join(names)}")
    if cut := sum(answer.asked and not answer.ended for answer in said):
        most = max(len(answer.ids) for answer in said)
        found.notes.append(f"{cut:,} answers did not end by themselves and were cut off after {most:,} tokens or less")
    found.health = health(said, [q.asked for q in questions], references_of(questions))
    found.answers = [
        dict(
            where=q.where,
            question=q.asked,
            answer=answer.full,
            references=list(q.references),
            ended=answer.ended,
        )
        for q, answer in zip(questions, said)
    ]


# ---- multiple choice


def _measure_choices(
    model: CausalLM, tokenizer: Tokenizer, found: Measured, names: list[str], settings: Settings
) -> None:
    questions = read_choices(found.path, settings.limit)
    found.rows = len(questions)
    examples = read_examples(found.path, settings.num_fewshot) if settings.num_fewshot else []
    counts = score(model, tokenizer, questions, chats=settings.chats, examples=examples, system=settings.system)
    chance = sum(1 / len(q.options) for q in questions) / len(questions)
    for name in names:
        kept = np.flatnonzero(counts[name][:, 1])
        if len(kept):
            found.add(name, counts[name][kept], [questions[n].where for n in kept], f"{len(examples)}-shot")
        if left := len(questions) - len(kept):
            limit = model.config.max_position_embeddings
            found.notes.append(f"{name}: {left:,} questions left out: with all that is shown, above {limit:,} tokens")
    found.notes.append(f"guessing would find {chance:.1%} of the right options")
