"""Several models answer the same questions: what each says, how surprised the others are by it, and what differs.

    result = compare(open_models(["full_sft", "rlhf"], "out"), read_questions("configs/test_questions.json"))
    print(write_report("comparison.html", result))

The result is plain values: the JSON of scripts/compare_models.py, and the data of its page. The first model is the one
that the others are compared with; every difference has a paired 95 % interval (evaluation/statistics.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.console import note
from common.files import atomic_file
from dataset.read.jsonl import require_file
from dataset.read.questions import Question, references_of
from evaluation.likelihood import log_likelihoods
from evaluation.lineage import facts as facts_of_stage
from evaluation.measure import OF_KIND, Measured, Settings, answer_questions, kind_of, measure
from evaluation.metrics import METRICS, ratio, to_install
from evaluation.models import Contender
from evaluation.page import write_page
from evaluation.statistics import bootstrap, paired_difference
from inference.answers import Answer
from inference.health import health, language, repetition, words
from tokenizer.chat import Encoded

FORMAT = "sparrow-comparison-1"
BITS = 1 / np.log(2)

# What an answer shows without a reference: name -> (title, of (answer, question) -> a number or None, form, better)
OF_AN_ANSWER: dict[str, tuple[str, Callable[[Answer, Question], float | None], str, int]] = {
    "ended": ("ends by itself", lambda answer, _: float(answer.ended), "share", 1),
    "rep_4": (
        "repeats itself (rep-4)",
        lambda answer, _: repetition(own, 4) if len(own := words(answer.text)) >= 4 else None,
        "share",
        -1,
    ),
    "wrong_language": ("another language than asked", lambda answer, q: _strays(answer.text, q), "share", -1),
    "words": ("words in an answer", lambda answer, _: float(len(words(answer.text))), "number", 0),
}


def compare(
    contenders: Sequence[Contender],
    questions: Sequence[Question],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    eval_data: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """settings: how answers are made. eval_data: held-out files, whose loss tells what a model has forgotten."""
    held_out = _held_out(contenders, eval_data, settings)  # first, so that mistakes in files show at once
    said: list[list[Answer]] = []
    models: list[dict[str, Any]] = []
    for contender in contenders:
        own = _settings_of(contender, settings)
        with contender.active() as model:
            answer_questions(model, contender.tokenizer, questions[:4], replace(own, max_new_tokens=4))  # to warm up
            began = time.perf_counter()
            said.append(answer_questions(model, contender.tokenizer, questions, own))
        seconds = time.perf_counter() - began
        tokens = sum(len(answer.ids) for answer in said[-1])
        stages = [dict(stage=e.get("stage", "?"), facts=facts_of_stage(e)) for e in contender.history.stages]
        models.append(
            contender.facts()
            | dict(
                hash=contender.history.hash,
                stages=stages,
                completes=contender.completes,
                seconds=round(seconds, 2),
                tokens=tokens,
                tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
                health=health(said[-1], [q.asked for q in questions], references_of(questions)),
            )
        )
    read = [_readings(reader, contenders, questions, said, settings) for reader in contenders]
    rows = [
        dict(
            where=q.where,
            kind=q.kind,
            prompt=_prompt(q),
            references=list(q.references),
            answers=[dict(text=own[n].full, ended=own[n].ended, tokens=len(own[n].ids)) for own in said],
            read=[[readings[author][n] for author in range(len(contenders))] for readings in read],
        )
        for n, q in enumerate(questions)
    ]
    return dict(
        format=FORMAT,
        id=_identity(models, rows),
        models=models,
        questions=rows,
        surprise=[[_mean_bits(own) for own in readings] for readings in read],
        figures=_figures(questions, said),
        held_out=held_out,
        votes=[],
    )


def write_report(output: str | Path, result: dict[str, Any]) -> Path:
    """Writes the result as .json and, to look at, as .html -> the path of the page. output: either of the two."""
    numbers, page = report_files(output)
    with atomic_file(numbers) as temporary:
        temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    title = ", ".join(model["name"] for model in result["models"])
    return write_page(page, "compare", title, result)


def report_files(output: str | Path) -> tuple[Path, Path]:
    """The .json and the .html that `output` names. Another ending than these is part of the name: run_v1.1"""
    output = Path(output)
    name = output.stem if output.suffix.lower() in (".json", ".html") else output.name
    return output.with_name(f"{name}.json"), output.with_name(f"{name}.html")


def _settings_of(contender: Contender, settings: Settings) -> Settings:
    return replace(settings, chats=not contender.completes)


def _prompt(question: Question) -> str:
    """What was asked; of a conversation, all of it."""
    if len(question.messages) == 1:
        return question.asked
    return "\n".join(f"{message['role']}: {message['content']}" for message in question.messages)


def _identity(models: list[dict], rows: list[dict]) -> str:
    """So that votes cannot be counted in another report: votes are about these answers."""
    content = [[model["name"] for model in models], [[row["prompt"], row["answers"]] for row in rows]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode(errors="replace")).hexdigest()[:16]


# ---- how surprised a model is by what the others say


def _readings(
    reader: Contender,
    authors: Sequence[Contender],
    questions: Sequence[Question],
    said: Sequence[Sequence[Answer]],
    settings: Settings,
) -> list[list[dict[str, Any]]]:
    """[author][question] -> {"pieces": text of each token, "bits": how unexpected each was for the reader}.

    Models with the same ids read each other's tokens; otherwise the text is encoded anew, so that what is compared are
    bits for the same text, and never bits for a token.
    """
    limit = reader.model.config.max_position_embeddings
    rows, found = [], []
    for author, answers in zip(authors, said):
        same = reader.tokenizer is author.tokenizer or reader.tokenizer.same_ids(author.tokenizer)
        for q, answer in zip(questions, answers):
            prompt = reader.encode(q.messages, settings.system, q.tools)
            ids = answer.ids if same else reader.tokenizer.encode(answer.full)
            ids = ids[: max(0, limit + 1 - len(prompt))]
            rows.append(Encoded(prompt + ids, [False] * len(prompt) + [True] * len(ids)))
            found.append(ids)
    with reader.active() as model:
        bits = [-logp * BITS for logp in log_likelihoods(model, rows, progress=f"{reader.name} reads")]
    readings = [_reading(reader, ids, own) for ids, own in zip(found, bits)]
    n = len(questions)
    return [readings[i * n : (i + 1) * n] for i in range(len(authors))]


def _reading(reader: Contender, ids: list[int], bits: np.ndarray) -> dict[str, Any]:
    """The text of the tokens with the bits of each. A token without a character of its own is joined to the next."""
    stream, pieces, costs, waiting = reader.tokenizer.stream(), [], [], 0.0
    for id, cost in zip(ids, bits.tolist()):
        waiting += cost
        if text := stream.push(id):
            pieces.append(text)
            costs.append(round(waiting, 2))
            waiting = 0.0
    if rest := stream.flush():
        pieces.append(rest)
        costs.append(round(waiting, 2))
    return dict(pieces=pieces, bits=costs)


def _mean_bits(readings: Sequence[dict[str, Any]]) -> float | None:
    """Per byte of the answers: the same unit for all tokenizers."""
    size = sum(len("".join(own["pieces"]).encode(errors="replace")) for own in readings)
    return round(sum(sum(own["bits"]) for own in readings) / size, 4) if size else None


# ---- figures of the answers, and their differences


def _figures(questions: Sequence[Question], said: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """Of each metric, every model's value and its difference to the first model's, on the rows that count for all."""
    found = []
    known = [n for n, q in enumerate(questions) if q.references]
    if known:
        references = [questions[n].references for n in known]
        usual = [name for name, metric in METRICS.items() if metric.of == "answers" and metric.usual]
        names = [name for name in usual if not to_install([name])]
        if not any("####" in q.references[0] for q in questions if q.references):
            names.remove("number")
        for name in names:
            metric = METRICS[name]
            assert metric.count
            counts = [metric.count([own[n].text for n in known], references) for own in said]
            found.append(_row_of_metric(name, [c for c, _ in counts]))
        if packages := to_install(usual):
            note(f"BLEU or ROUGE left out: pip install {packages}")
    for name, (title, of, form, better) in OF_AN_ANSWER.items():
        values = [[of(answer, q) if answer.asked else None for answer, q in zip(own, questions)] for own in said]
        shared = [n for n in range(len(questions)) if all(own[n] is not None for own in values)]
        if shared:
            counts = [np.array([[own[n], 1.0] for n in shared]) for own in values]
            found.append(_row(name, title, form, better, ratio, counts))
    return [row for row in found if not np.isnan(row["values"][0]["value"])]  # no reference has a number, say


def _row(
    name: str, title: str, form: str, better: int, value: Callable[[np.ndarray], float], counts: list[np.ndarray]
) -> dict[str, Any]:
    """counts: one (n, k) for each model, about the same n rows."""
    values, changes = [], []
    for own in counts:
        low, high = bootstrap(value, own) or (None, None)
        values.append(dict(value=value(own.sum(0)), low=low, high=high))
        if own is counts[0]:
            changes.append(None)
            continue
        change, interval = paired_difference(value, counts[0], own)
        changes.append(dict(value=change, low=interval and interval[0], high=interval and interval[1]))
    return dict(name=name, title=title, form=form, better=better, rows=len(counts[0]), values=values, changes=changes)


def _row_of_metric(name: str, counts: list[np.ndarray]) -> dict[str, Any]:
    metric = METRICS[name]
    form = "share" if "%" in metric.form else "number"
    return _row(name, metric.title, form, metric.better, metric.value, counts)


def _strays(text: str, question: Question) -> float | None:
    expected, found = language(question.references[0] if question.references else question.asked), language(text)
    return float(expected != found) if expected and found else None


# ---- forgetting: the loss on held-out files


def _held_out(contenders: Sequence[Contender], paths: Sequence[str | Path], settings: Settings) -> list[dict[str, Any]]:
    """Of each file: bits per byte (and perplexity, if all models have the same tokenizer), or what the file allows."""
    same = all(contender.tokenizer.same_ids(contenders[0].tokenizer) for contender in contenders)
    kinds = ("likelihood", "choice", "pairs")  # nothing that has to be generated
    known = [name for name, metric in METRICS.items() if metric.of in kinds and (same or name != "ppl")]
    window = min(settings.window, *(contender.model.config.max_position_embeddings for contender in contenders))
    found = []
    for path in paths:
        names = [name for name in known if METRICS[name].of in OF_KIND[kind_of(require_file(path))]]
        results: list[Measured] = []
        for contender in contenders:
            with contender.active() as model:
                own = replace(_settings_of(contender, settings), window=window)
                results.append(measure(model, contender.tokenizer, path, names, own))
        rows = []
        for name in results[0].counts:
            tables = [
                dict(zip(result.labels[name], result.counts[name])) for result in results if name in result.counts
            ]
            shared = [label for label in tables[0] if all(label in table for table in tables)]
            if len(tables) == len(results) and shared:
                rows.append(_row_of_metric(name, [np.array([table[label] for label in shared]) for table in tables]))
        notes = list(dict.fromkeys(line for result in results for line in result.notes))
        found.append(dict(file=Path(path).name, rows=results[0].rows, figures=rows, notes=notes))
    return found
