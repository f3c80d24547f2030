"""The model of what training costs, and the page that shows its table."""

import pytest

from benchmarks.cost import PRETRAIN, SFT, Claim, fill, speed, table
from common.files import ROOT


def test_padding_by_hand():
    """480 bytes of a row are 160 Chinese characters or 100 tokens, of 512; 3,600 rows in an hour are 512 positions a
    second."""
    claim = Claim("by hand", hours=1, file_bytes=480 * 3600, rows=3600)
    assert fill(claim) == pytest.approx(100 / 512) and speed(claim) == pytest.approx(512)
    assert fill(Claim("long rows", 1, 1e9, 1000)) == 1


def test_time_and_price_by_hand():
    """At twice their speed, without padding and with half the tokens in pretraining."""
    hours = PRETRAIN.hours * fill(PRETRAIN) / 2 / 2, SFT.hours * fill(SFT) / 2
    last = table(price=10, ratio=0.5, ours=2 * speed(PRETRAIN))[-1]
    assert f"| {hours[0]:.2f} h | {hours[1]:.2f} h | {sum(hours):.2f} h, {10 * sum(hours):.2f} yuan |" in last


def test_the_page_shows_what_the_model_says():
    page = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
    assert "\n".join(table(price=2.73 / 2.1, ratio=0.45, ours=0)) in page
