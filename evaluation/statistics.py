"""How sure a figure is: 95 % intervals by bootstrap, the difference of two models on the same rows, and a sign test.

    low, high = bootstrap(value, rows)                # rows (n, k): what a metric counts of each row
    delta, (low, high) = paired_difference(value, rows_a, rows_b)
    p = sign_test(wins, losses)

`value` turns the sum of some rows, (k,), into the metric. So it may be a ratio of sums, as perplexity and BLEU are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

Value = Callable[[np.ndarray], float]
RESAMPLES, LEVEL = 1000, 0.95


def bootstrap(value: Value, rows: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval (Efron and Tibshirani 1993, chapter 13). None of fewer than two rows."""
    if len(rows) < 2:
        return None
    return _interval([value(counts @ rows) for counts in _resamples(len(rows), seed)])


def paired_difference(value: Value, ours: np.ndarray, others: np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """value(others) - value(ours), and its interval. Row i of both has to be about the same question: both are drawn
    together, so that hard questions do not count as a difference (Koehn 2004, paired bootstrap resampling)."""
    assert ours.shape[0] == others.shape[0]
    difference = value(others.sum(0)) - value(ours.sum(0))
    if len(ours) < 2:
        return difference, None
    drawn = [value(counts @ others) - value(counts @ ours) for counts in _resamples(len(ours))]
    return difference, _interval(drawn)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p: how often equally good sides would differ at least so much by chance. Ties are left out."""
    n, less = wins + losses, min(wins, losses)
    tail = sum(math.comb(n, k) for k in range(less + 1)) / 2**n
    return min(1.0, 2 * tail)


def _resamples(n: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn, RESAMPLES times."""
    random = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(random.integers(n, size=n), minlength=n)


def _interval(values: list[float]) -> tuple[float, float] | None:
    finite = np.array(values)[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
