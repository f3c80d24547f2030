"""The tiny world's exam, answered by a model.

    result = run_benchmark(model, tokenizer)             # or: python eval_model.py --benchmark tiny_world
    print(result["table"])

Works with any weights and any tokenizer that has a chat format. Answers are greedy, so the same weights get the same
score.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import cache
from pathlib import Path

from dataset.tiny_world import exam
from dataset.tiny_world.exam import Scores
from dataset.tiny_world.files import generate as generate_world
from dataset.tiny_world.world import LATER
from evaluation.likelihood import log_likelihoods
from inference.answers import answers
from model.transformer import CausalLM
from tokenizer.chat import encode_chat
from tokenizer.text import Tokenizer

LONGEST = 64  # tokens; no right answer is nearly as long


def run_benchmark(model: CausalLM, tokenizer: Tokenizer, question_seed: int = 0, world_seed: int = 0) -> dict:
    """The exam about the world that `dataset/tiny_world --seed world_seed` writes.

    Plain values: score, scores[who]["<kind> <language>"] of the model and the baselines, later[kind], table (to
    print), answers.

    `later` are the kinds of questions that the stages after SFT teach. They are not part of the score.
    """
    questions, start = exam.draw_questions(world_seed, question_seed), time.perf_counter()
    others = exam.draw_questions(world_seed, question_seed, LATER)
    replies = answer(model, tokenizer, [question.prompt for question in questions + others])
    seconds = round(time.perf_counter() - start, 2)
    graded = [dict(vars(q), reply=reply, right=exam.grade(q, reply)) for q, reply in zip(questions + others, replies)]
    columns = {
        "model": exam.scores(questions, replies[: len(questions)]),
        **baselines(world_seed, question_seed),
    }
    later = {kind: _share(row["right"] for row in graded if row["kind"] == kind) for kind in LATER}
    after = ", ".join(f"{kind} {share:.1%}" for kind, share in later.items())
    return {
        "benchmark": "tiny_world",
        "world_seed": world_seed,
        "question_seed": question_seed,
        "score": _share(row["right"] for row in graded[: len(questions)]),
        "scores": {who: {" ".join(group): share for group, share in of.items()} for who, of in columns.items()},
        "later": later,
        "seconds": seconds,
        "table": f"{exam.table(questions, columns)}\nand what later stages teach: {after}",
        "answers": graded,
    }


@cache  # the demo examines several models
def baselines(world_seed: int, question_seed: int) -> dict[str, Scores]:
    """The scores of two ways to answer without a model."""
    questions = exam.draw_questions(world_seed, question_seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = generate_world(folder, world_seed, ("sft",))["sft"]
        nearest = exam.nearest_row_baseline(questions, rows)
    return {"nearest row": nearest, "most frequent": exam.most_frequent_baseline(questions)}


def _share(right) -> float:
    right = list(right)
    return sum(right) / len(right)


def answer(model: CausalLM, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [said.text for said in answers(model, tokenizer, questions, max_new_tokens=LONGEST, progress="exam")]


def preference_accuracy(model: CausalLM, tokenizer: Tokenizer, pairs: Path) -> float:
    """Share of the pairs of a file whose chosen answer the model finds likelier than the rejected one."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    sides = [encode_chat(tokenizer, row[side]) for side in ("chosen", "rejected") for row in rows]
    likelihood = [logp.sum() for logp in log_likelihoods(model, sides)]
    return _share(chosen > rejected for chosen, rejected in zip(likelihood[: len(rows)], likelihood[len(rows) :]))
