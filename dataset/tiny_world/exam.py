"""The tiny world's exam: its questions, how a reply is graded, and what can be scored without a model.

    from dataset.tiny_world.exam import draw_questions, report
    from dataset.tiny_world.files import generate
    questions = draw_questions(seed=0)
    print(report(questions, [my_model(q.prompt) for q in questions], generate("out/tiny_world")["sft"]))

A reply is right when it is the answer: spaces, final punctuation and full- or half-width forms aside, nothing more and
nothing less. So a reply that lists candidates is wrong, and so is the right value in somebody else's sentence.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

import dataset.tiny_world.words as text
from common.console import UserError
from dataset.tiny_world.world import KINDS, Dice, World

EXAM_SIZE = {
    "fact": 100,
    "reading": 40,
    "sum": 40,
    "calendar": 40,
    "list": 40,
    "translation": 40,
    "steps": 60,
    "identity": 20,
    "manner": 40,
}  # per language

Scores = dict[tuple[str, str], float]  # (kind, language) -> share of right replies


@dataclass(frozen=True)
class Question:
    kind: str  # one of world.KINDS or world.LATER
    language: str  # zh or en: the language it is asked in
    prompt: str  # what the user says
    answer: str  # the one right reply


def draw_questions(seed: int = 0, question_seed: int = 0, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """The exam about the world of `seed`; another `question_seed` draws other questions of the same kinds."""
    world, dice, questions = World(seed), Dice("exam", seed, question_seed), []
    for kind in kinds:
        size = EXAM_SIZE[kind]
        for language in text.LANGUAGES:
            asked: dict[str, str] = {}
            while len(asked) < size:
                [(prompt, answer)] = world.ask(kind, dice, language, exam=True)
                asked.setdefault(prompt, answer)
            questions += [Question(kind, language, prompt, answer) for prompt, answer in asked.items()]
    return questions


def normalise(text: str) -> str:
    """Full width -> half width, no final punctuation, and no space except between two words or numbers."""
    text = unicodedata.normalize("NFKC", text).strip().rstrip(".。!！ \n\t")
    return re.sub(
        r"\s+",
        lambda m: (
            " " if re.search(r"[A-Za-z0-9]$", text[: m.start()]) and re.match(r"[A-Za-z0-9]", text[m.end() :]) else ""
        ),
        text,
    )


def grade(question: Question, reply: str) -> bool:
    if question.kind == "manner":  # what is said is free, how it begins and ends is not
        opening, closing = map(normalise, question.answer.split("…"))
        said = normalise(reply)
        return said.startswith(opening) and said.endswith(closing) and len(said) > len(opening) + len(closing) + 4
    return normalise(reply) == normalise(question.answer)


def scores(questions: list[Question], replies: list[str]) -> Scores:
    """Share of right replies per (kind, language); the kind "all" is the mean over a language's questions."""
    if len(questions) != len(replies):
        raise UserError(f"{len(replies)} replies to {len(questions)} questions: give exactly one reply to each")
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for question, reply in zip(questions, replies):
        for kind in (question.kind, "all"):
            right[kind, question.language].append(grade(question, reply))
    return {group: sum(marks) / len(marks) for group, marks in right.items()}


def sft_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Every (what the user said, what the assistant replied) of an SFT file, later turns included."""
    pairs = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            turns = json.loads(line)["conversations"]
            pairs += [(a["content"], b["content"]) for a, b in zip(turns, turns[1:]) if b["role"] == "assistant"]
    return pairs


def nearest_row_baseline(questions: list[Question], sft_path: str | Path) -> Scores:
    """What a copier scores: the reply of the SFT turn most like the question (tf-idf of character bi- and trigrams)."""
    pairs = sft_pairs(sft_path)
    postings: dict[str, list[int]] = defaultdict(list)
    for index, (prompt, _) in enumerate(pairs):
        for gram in _grams(prompt):
            postings[gram].append(index)
    weight = {gram: log(len(pairs) / len(rows)) for gram, rows in postings.items()}
    rows_of = {gram: np.array(rows) for gram, rows in postings.items()}
    norm = np.array([sum(weight[g] ** 2 for g in _grams(prompt)) ** 0.5 + 1e-9 for prompt, _ in pairs])
    replies = []
    for question in questions:
        likeness = np.zeros(len(pairs))
        for gram in sorted(_grams(question.prompt) & weight.keys()):
            likeness[rows_of[gram]] += weight[gram] ** 2
        replies.append(pairs[int(np.argmax(likeness / norm))][1])
    return scores(questions, replies)


def _grams(text: str) -> set[str]:
    return {text[i : i + n] for n in (2, 3) for i in range(len(text) - n + 1)}


def most_frequent_baseline(questions: list[Question]) -> Scores:
    """What the best constant reply scores, chosen with the answers in hand: no constant reply can do better."""
    answers: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for question in questions:
        for kind in (question.kind, "all"):
            answers[kind, question.language][normalise(question.answer)] += 1
    return {group: max(count.values()) / sum(count.values()) for group, count in answers.items()}


def report(questions: list[Question], replies: list[str], sft_path: str | Path | None = None) -> str:
    """The score table: a line per kind and language, next to what it is worth (the baselines)."""
    columns = {"model": scores(questions, replies)}
    if sft_path is not None:
        columns["nearest row"] = nearest_row_baseline(questions, sft_path)
    return table(questions, columns | {"most frequent": most_frequent_baseline(questions)})


def table(questions: list[Question], columns: dict[str, Scores]) -> str:
    asked = Counter((q.kind, q.language) for q in questions) + Counter(("all", q.language) for q in questions)
    lines = [f"{'kind':<12} {'':<4} {'asked':>5}" + "".join(f"{name:>15}" for name in columns)]
    for kind, language in next(iter(columns.values())):
        figures = "".join(f"{column[kind, language]:>14.1%} " for column in columns.values())
        lines.append(f"{kind:<12} {language:<4} {asked[kind, language]:>5}{figures}".rstrip())
    return "\n".join(lines)
