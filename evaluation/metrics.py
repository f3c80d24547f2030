"""The metrics: what each counts of a row, and how the sum of these counts becomes its value.

    rows, remark = METRICS["bleu"].count(replies, references)     # (n, k), one row for each reply
    value = METRICS["bleu"].value(rows.sum(0))
    low, high = bootstrap(METRICS["bleu"].value, rows)            # evaluation/statistics.py

A metric of answers counts (replies, references), with a list of references for each reply. The rows of the others come
from evaluation/likelihood.py and evaluation/choice.py. A new metric is a line of METRICS.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from common.console import UserError
from inference.health import HAN

Counts = tuple[np.ndarray, str]  # (n, k) fp64; a remark: how it was counted
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Metric:
    title: str
    of: str  # "likelihood", "answers", "choice" or "pairs": what has to be computed for it
    value: Callable[[np.ndarray], float]  # the sum of rows (k,) -> the metric; nan if it cannot be said
    count: Callable[[Sequence[str], References], Counts] | None = None
    form: str = "{:.1%}"  # how it is printed
    better: int = 1  # 1: more is better; -1: less is
    usual: bool = True  # measured where nobody says what to measure
    needs: tuple[str, ...] = ()  # packages, by the names that they are imported by


def chosen(names: Sequence[str]) -> list[str]:
    """The metrics that these names ask for, each once. UserError for one that is not known or needs a package."""
    found = []
    for name in names:
        word = re.sub("[-_ ]", "", name.lower())
        match = {known.lower().replace("_", ""): known for known in [*GROUPS, *METRICS]}.get(word)
        if match is None and word in ("human", "humanevaluation"):
            raise UserError("--metrics human: people vote in the report of scripts/compare_models.py")
        if match is None:
            raise UserError(f"--metrics {name}: choose from {', '.join([*METRICS, *GROUPS])}")
        own = GROUPS.get(match, (match,))
        if packages := to_install(own):  # now, not after minutes of answering
            raise UserError(f"--metrics {name}: needs what is not installed, pip install {packages}")
        found += own
    return list(dict.fromkeys(found))


def to_install(names: Sequence[str]) -> str:
    """The packages that these metrics lack, as pip calls them: "rouge-score sacrebleu", or "" if none."""
    lacking = {package for name in names for package in METRICS[name].needs if find_spec(package) is None}
    return " ".join(sorted(lacking)).replace("_", "-")


# ---- values


def ratio(sums: np.ndarray) -> float:
    """(sum of scores, rows that count) -> their mean."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def perplexity(sums: np.ndarray) -> float:
    """(nats, tokens, bytes) -> e to the mean loss of a token. Only models of one tokenizer can be compared by it."""
    return float(np.exp(sums[0] / sums[1])) if sums[1] else math.nan


def bits_per_byte(sums: np.ndarray) -> float:
    """(nats, tokens, bytes) -> bits per byte of UTF-8, as in arXiv:2101.00027, section 3.1: the same for any
    tokenizer."""
    return float(sums[0] / math.log(2) / sums[2]) if sums[2] else math.nan


def bleu(sums: np.ndarray) -> float:
    from sacrebleu.metrics import BLEU

    counts = [int(count) for count in sums]
    if not counts[9]:
        return math.nan
    return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score


# ---- counts of answers


def count_bleu(replies: Sequence[str], references: References) -> Counts:
    """sacrebleu's counts: matches and n-grams for n = 1..4, length of the reply and of the reference."""
    from sacrebleu.metrics import BLEU

    texts = [text for own in references for text in own]
    chinese = sum(bool(re.search(f"[{HAN}]", text)) for text in texts)
    tokenize = "zh" if chinese * 10 >= len(texts) else "13a"
    scorer = BLEU(tokenize=tokenize, effective_order=True)  # for the counts of a sentence it makes no difference
    rows = np.zeros((len(replies), 10))
    for row, reply, own in zip(rows, replies, references):
        found = scorer.sentence_score(reply, list(own))
        row[:] = [*found.counts, *found.totals, found.sys_len, found.ref_len]
    return rows, f"sacrebleu, tokenize={tokenize}"


class _RougeWords:
    """rouge_score's own words, and each Chinese character as a word; rouge_score alone drops all of them."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(f"[a-z0-9]+|[{HAN}]", text.lower())


class _RougeJieba:
    """The same, with the Chinese words that jieba finds instead of characters."""

    def __init__(self):
        import jieba

        jieba.setLogLevel("ERROR")  # it tells how it loads its dictionary
        self.cut = jieba.lcut

    def tokenize(self, text: str) -> list[str]:
        runs = re.findall(f"[a-z0-9]+|[{HAN}]+", text.lower())
        return [word for run in runs for word in ([run] if run.isascii() else self.cut(run))]


def count_rouge(
    kind: str, words: Callable[[], Any] = _RougeWords, how: str = "characters"
) -> Callable[[Sequence[str], References], Counts]:
    def count(replies: Sequence[str], references: References) -> Counts:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], tokenizer=words())
        best = [scorer.score_multi(list(own), reply)[kind].fmeasure for reply, own in zip(replies, references)]
        return _scores(best), f"rouge_score, F-measure, Chinese by {how}"

    return count


def count_exact(replies: Sequence[str], references: References) -> Counts:
    scores = [max(same_answer(reply, reference) for reference in own) for reply, own in zip(replies, references)]
    return _scores(scores), "case, punctuation and articles aside"


def count_f1(replies: Sequence[str], references: References) -> Counts:
    scores = [max(overlap(reply, reference) for reference in own) for reply, own in zip(replies, references)]
    return _scores(scores), "of words, Chinese by characters"


def count_number(replies: Sequence[str], references: References) -> Counts:
    """GSM8K's: whether the last number, or the one after ####, is that of the reference."""
    rows = np.zeros((len(replies), 2))
    for row, reply, own in zip(rows, replies, references):
        wanted = {number for reference in own if (number := last_number(reference)) is not None}
        row[:] = last_number(reply) in wanted, bool(wanted)
    without = int((rows[:, 1] == 0).sum())
    return rows, "the last number" + (f"; {without:,} references have none and do not count" if without else "")


def _scores(scores: Sequence[float]) -> np.ndarray:
    return np.stack((np.array(scores, np.float64), np.ones(len(scores))), axis=1)


# ---- texts


TOKEN = re.compile(rf"(?<!\w)-?\d+(?:[.,]\d+)*|[{HAN}]|[^\W_{HAN}]+")
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|(?<![\w.])-?\.\d+|\d[\d,]*(?:\.\d+)?")
MINUS = str.maketrans("−", "-")  # the sign of mathematics (U+2212), which NFKC leaves as it is


def half_width(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(MINUS)


def tokens(text: str) -> list[str]:
    """Words in lower case and half width without articles, as SQuAD's evaluation script compares them; numbers stay
    whole, and each Chinese character is a word."""
    text = half_width(text).lower()
    found = [word.replace(",", "") if word[-1].isdigit() else word for word in TOKEN.findall(text)]
    return [word for word in found if word not in ("a", "an", "the")] or found  # "A" alone is an answer


def same_answer(reply: str, reference: str) -> bool:
    ours, theirs = tokens(reply), tokens(reference)
    return ours == theirs if ours or theirs else reply.strip() == reference.strip()


def overlap(reply: str, reference: str) -> float:
    """F1 of the words of two texts, counted with their repetitions (SQuAD, arXiv:1606.05250, section 6.1)."""
    ours, theirs = tokens(reply), tokens(reference)
    if not ours or not theirs:
        return float(same_answer(reply, reference))
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def last_number(text: str) -> Decimal | None:
    """The number after the last ####, if there is one, or the last number of the text."""
    text = re.sub(r"(?<=-)[$€£¥](?=[\d.])", "", half_width(text))  # -$5 is -5
    marked = NUMBER.findall(text.rpartition("####")[2]) if "####" in text else []
    found = marked[:1] or NUMBER.findall(text)[-1:]
    return Decimal(found[0].replace(",", "")) if found else None


BY_JIEBA = (_RougeJieba, "jieba's words")
ROUGE = partial(Metric, of="answers", value=ratio, needs=("rouge_score",))
JIEBA = partial(Metric, of="answers", value=ratio, needs=("rouge_score", "jieba"), usual=False)
METRICS = {
    "ppl": Metric("perplexity", "likelihood", perplexity, form="{:.3f}", better=-1),
    "bpb": Metric("bits per byte", "likelihood", bits_per_byte, form="{:.4f}", better=-1),
    "bleu": Metric("BLEU", "answers", bleu, count_bleu, form="{:.2f}", needs=("sacrebleu",)),
    "rouge1": ROUGE("ROUGE-1", count=count_rouge("rouge1")),
    "rouge2": ROUGE("ROUGE-2", count=count_rouge("rouge2")),
    "rougeL": ROUGE("ROUGE-L", count=count_rouge("rougeL")),
    "rouge1_jieba": JIEBA("ROUGE-1, jieba", count=count_rouge("rouge1", *BY_JIEBA)),
    "rouge2_jieba": JIEBA("ROUGE-2, jieba", count=count_rouge("rouge2", *BY_JIEBA)),
    "rougeL_jieba": JIEBA("ROUGE-L, jieba", count=count_rouge("rougeL", *BY_JIEBA)),
    "exact": Metric("exact answers", "answers", ratio, count_exact),
    "f1": Metric("F1 of words", "answers", ratio, count_f1),
    "number": Metric("right numbers", "answers", ratio, count_number),
    "choice": Metric("likeliest option right", "choice", ratio),
    "choice_norm": Metric("likeliest option right, per byte", "choice", ratio),
    "letter": Metric("likeliest letter right", "choice", ratio),
    "preference": Metric("chosen likelier than rejected", "pairs", ratio),
}
GROUPS = {
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "rouge_jieba": ("rouge1_jieba", "rouge2_jieba", "rougeL_jieba"),
    "perplexity": ("ppl",),
    "accuracy": ("exact",),
}
