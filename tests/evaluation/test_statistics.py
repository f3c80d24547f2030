"""Error bars: against formulas where there are any, and the story of why rows are drawn in pairs."""

import math

import numpy as np
import pytest

from evaluation.metrics import METRICS, ratio
from evaluation.statistics import bootstrap, paired_difference, sign_test


def scores(values):
    return np.stack((np.array(values, float), np.ones(len(values))), 1)


def test_the_interval_of_a_share_is_the_binomial_one():
    """Of 400 answers 30 % are right: 0.3 +- 1.96 sqrt(0.3 x 0.7 / 400) = 0.255 .. 0.345."""
    low, high = bootstrap(ratio, scores([1] * 120 + [0] * 280))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == (pytest.approx(0.3 - half, abs=0.006), pytest.approx(0.3 + half, abs=0.006))


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    """Perplexity weights rows by their tokens. All rows alike: no spread, whatever their lengths."""
    tokens = np.arange(1, 50)
    low, high = bootstrap(METRICS["ppl"].value, np.stack((tokens * math.log(7), tokens, tokens), 1))
    assert low == pytest.approx(7) and high == pytest.approx(7)


def test_of_one_row_nothing_can_be_said():
    assert bootstrap(ratio, scores([1])) is None
    assert paired_difference(ratio, scores([0]), scores([1])) == (1.0, None)


def test_draws_of_which_nothing_can_be_said_are_left_out():
    """Of two rows one counts: a quarter of the draws have none that counts, and no mean."""
    assert bootstrap(ratio, np.array([[1.0, 1.0], [0.0, 0.0]])) == (1.0, 1.0)
    assert bootstrap(ratio, np.zeros((2, 2))) is None


def test_pairs_see_what_two_intervals_cannot():
    """Questions differ more than the models do: the second is better by 0.05 on every one. Each model's own interval is
    far wider than that; the difference is certain."""
    hard = np.random.default_rng(0).uniform(0, 0.9, 60)
    ours, others = scores(hard), scores(hard + 0.05)
    low, high = bootstrap(ratio, ours)
    assert high - low > 0.1
    delta, (low, high) = paired_difference(ratio, ours, others)
    assert delta == pytest.approx(0.05) and low == pytest.approx(0.05) and high == pytest.approx(0.05)


def test_the_same_rows_give_the_same_interval():
    rows = scores(np.random.default_rng(1).uniform(size=30))
    assert bootstrap(ratio, rows) == bootstrap(ratio, rows) != bootstrap(ratio, rows, seed=1)


def test_the_sign_test_by_hand():
    """9 wins of 10: 2 x (1 + 10) / 1024. Ties say nothing, and are not given."""
    assert sign_test(9, 1) == sign_test(1, 9) == pytest.approx(22 / 1024)
    assert sign_test(5, 5) == sign_test(0, 0) == 1.0
