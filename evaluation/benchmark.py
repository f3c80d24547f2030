"""The tiny world's exam, answered by a model.

    result = run_benchmark(model, tokenizer)             # or: python eval_model.py --benchmark tiny_world
    print(result["table"])

Works with any weights and any tokenizer that has a chat format. Answers are greedy, so the same weights get the same
score.
"""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import ROOT
from dataset.tiny_world import exam
from dataset.tiny_world.exam import Scores
from dataset.tiny_world.files import generate as generate_world
from dataset.tiny_world.world import LATER
from inference.decode import generate
from inference.sampling import Sampling
from model.transformer import CausalLM
from tokenizer.chat import encode_chat
from tokenizer.text import Tokenizer

WORLD = ROOT / "out/tiny_world"  # the folder that the training stages use too
ROWS = 64  # questions answered at once
LONGEST = 64  # tokens; no right answer is nearly as long


def run_benchmark(model: CausalLM, tokenizer: Tokenizer, question_seed: int = 0) -> dict:
    """Plain values: score, scores[who]["<kind> <language>"] of the model and the baselines, later[kind], table (to
    print), answers.

    `later` are the kinds of questions that the stages after SFT teach. They are not part of the score.
    """
    questions, start = exam.draw_questions(question_seed=question_seed), time.perf_counter()
    others = exam.draw_questions(question_seed=question_seed, kinds=LATER)
    replies = answer(model, tokenizer, [question.prompt for question in questions + others])
    seconds = round(time.perf_counter() - start, 2)
    answers = [dict(vars(q), reply=reply, right=exam.grade(q, reply)) for q, reply in zip(questions + others, replies)]
    columns = {
        "model": exam.scores(questions, replies[: len(questions)]),
        **baselines(question_seed),
    }
    later = {kind: _share(row["right"] for row in answers if row["kind"] == kind) for kind in LATER}
    after = ", ".join(f"{kind} {share:.1%}" for kind, share in later.items())
    return {
        "benchmark": "tiny_world",
        "question_seed": question_seed,
        "score": _share(row["right"] for row in answers[: len(questions)]),
        "scores": {who: {" ".join(group): share for group, share in of.items()} for who, of in columns.items()},
        "later": later,
        "seconds": seconds,
        "table": f"{exam.table(questions, columns)}\nand what later stages teach: {after}",
        "answers": answers,
    }


@cache  # the demo examines several models
def baselines(question_seed: int) -> dict[str, Scores]:
    """The scores of two ways to answer without a model."""
    questions = exam.draw_questions(question_seed=question_seed)
    nearest = exam.nearest_row_baseline(questions, generate_world(WORLD)["sft"])
    return {"nearest row": nearest, "most frequent": exam.most_frequent_baseline(questions)}


def _share(right) -> float:
    right = list(right)
    return sum(right) / len(right)


def answer(model: CausalLM, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    ask = lambda prompt: encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True).ids
    ids, replies = [ask(prompt) for prompt in prompts], [""] * len(prompts)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # a batch is padded to its longest prompt
    options = dict(max_new_tokens=LONGEST, stop=tokenizer.stop_ids)
    with tqdm(total=len(ids), desc="exam", unit=" questions", leave=False, disable=None) as bar:
        for batch in (order[i : i + ROWS] for i in range(0, len(order), ROWS)):
            said = generate(model, [ids[i] for i in batch], Sampling(temperature=0), **options)
            for i, reply in zip(batch, said):
                replies[i] = without_thoughts(tokenizer, reply)
            bar.update(len(batch))
    return replies


def without_thoughts(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The answer in a reply: the text after its last </think>, without control tokens."""
    closes = tokenizer.control.get("</think>")
    after = next((i + 1 for i in reversed(range(len(ids))) if ids[i] == closes), 0)
    return tokenizer.decode(ids[after:], skip_control=True).strip()


@torch.no_grad()
def preference_accuracy(model: CausalLM, tokenizer: Tokenizer, pairs: Path) -> float:
    """Share of the pairs of a file whose chosen answer the model finds likelier than the rejected one."""
    right = []
    for line in pairs.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        likelihood = {}
        for side in ("chosen", "rejected"):
            encoded = encode_chat(tokenizer, row[side])
            ids = torch.tensor([encoded.ids])  # (1, T)
            targets = ids.masked_fill(~torch.tensor([encoded.trained]), -100)
            likelihood[side] = -model(ids[:, :-1], targets=targets[:, 1:]).loss.sum().item()
        right.append(likelihood["chosen"] > likelihood["rejected"])
    return _share(right)
