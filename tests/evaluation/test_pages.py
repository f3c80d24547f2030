"""What the two pages show, with figures made up so that each differs from its neighbours: a page that takes a number
from the wrong place shows another one."""

import json
import re

import pytest
import torch

from evaluation.page import render, write_page
from evaluation.votes import tally
from evaluation.xray import _packed

QUESTIONS = 12


def model(name: str) -> dict:
    facts = dict(path=f"{name}.pth", base="", parameters=1e6, adapter_parameters=0, bytes=4e6, dtype="float32")
    return dict(facts, name=name, device="cpu", tokens=9, tokens_per_second=5.0, health=dict(ended=0.5), stages=[])


def question(n: int, ours: str, theirs: str, kind: str = "sums") -> dict:
    """Bits as (reader, author): aa 1, ab 20, ba 3, bb 40; and n more for question n."""
    bits = [[1 + n, 20 + n], [3 + n, 40 + n]]
    read = [[dict(pieces=[text], bits=[own]) for text, own in zip((ours, theirs), row)] for row in bits]
    said = [dict(text=ours, ended=True, tokens=2), dict(text=theirs, ended=n != 0, tokens=3)]
    return dict(prompt=f"question {n}", kind=kind, references=[], answers=said, read=read, where=f"q:{n}")


def figure(name: str, better: int, low: float, high: float) -> dict:
    change = dict(value=(low + high) / 2, low=low, high=high)
    values = [dict(value=1.0, low=None, high=None), dict(value=1.0 + change["value"], low=None, high=None)]
    common = dict(name=name, title=name, form="number", rows=3)
    return dict(common, better=better, values=values, changes=[None, change])


@pytest.fixture
def compared() -> dict:
    questions = [question(0, "the small bird", "the tall bird"), question(1, "yes", "yes", kind="talk")]
    questions += [question(n, f"ours {n}", f"theirs {n}") for n in range(2, QUESTIONS)]
    figures = [figure("more", 1, 0.1, 0.3), figure("less", -1, 0.1, 0.3), figure("unclear", 1, -0.1, 0.3)]
    figures.append(figure("neutral", 0, 0.1, 0.3))
    surprise = [[0.1, 0.2], [0.3, 0.4]]
    models = [model("a"), model("b")]
    return dict(id="r", models=models, questions=questions, figures=figures, surprise=surprise, held_out=[], votes=[])


def click(browser, text: str) -> None:
    found = f"[...document.querySelectorAll('button')].find((b) => b.innerText.startsWith({json.dumps(text)}))"
    browser.evaluate(f"{found}.click()")


def each(browser, selector: str, what: str = "innerText") -> list:
    return browser.evaluate(f"[...document.querySelectorAll({selector!r})].map((e) => e.{what})")


def test_a_number_stands_beside_the_one_who_needed_it(compared, browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html", "compare", "a and b", compared))
    under = each(browser, ".answers .answer > .small:last-child")
    assert under[:2] == ["for a: 1 bits · for b: 3 bits", "for a: 20 bits · for b: 40 bits"]
    table = browser.evaluate(
        "[...[...document.querySelectorAll('section')].find((s) => s.innerText.startsWith('How surprised'))"
        ".querySelectorAll('tbody tr')].map((row) => row.innerText.split('\\t'))"
    )
    assert table == [["a", "0.1", "0.2"], ["b", "0.3", "0.4"]], "a row reads what a column says"
    click(browser, "how surprised b is")
    assert each(browser, ".word", "title")[:2] == ["3 bits", "40 bits"]


def test_the_word_in_which_answers_part_is_marked(compared, browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html", "compare", "a and b", compared))
    assert each(browser, ".differs")[:2] == ["small", "tall"]
    assert len(each(browser, ".differs")) == 2 * (QUESTIONS - 1), "the second question has the same answer twice"
    heads = each(browser, ".answer > .row:first-child")
    assert "cut off" in heads[1] and sum("cut off" in head for head in heads) == 1, "one answer did not end"


def test_the_kinds_of_questions(compared, browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html", "compare", "a and b", compared))
    for kind, count in (("talk", 1), ("sums", QUESTIONS - 1), ("", QUESTIONS)):
        browser.evaluate(
            f"(() => {{ const s = document.querySelector('select'); s.value = '{kind}';"
            " s.dispatchEvent(new Event('change')); })()"
        )
        assert len(each(browser, "section > .question")) == count
    assert browser.evaluate("document.querySelector('select').value") == ""


def test_only_clear_changes_are_coloured(compared, browser, tmp_path):
    """A rise is good where more is better, bad where less is; grey if the interval holds 0 or neither is better."""
    browser.open(write_page(tmp_path / "page.html", "compare", "a and b", compared))
    tints = each(browser, ".interval", "style.getPropertyValue('--tint')")
    assert tints == ["var(--good)", "var(--bad)", "var(--dim)", "var(--dim)"]
    assert "less (less is better)" in browser.text("#page") and "neutral (" not in browser.text("#page")


def on_the_left(browser) -> str:
    """The model whose answer stands on the left side of a vote."""
    sides = ["a" if "ours" in text or "small" in text else "b" for text in each(browser, ".votes .answer .text")]
    assert sorted(sides) == ["a", "b"]
    return sides[0]


def test_a_vote_is_for_the_answer_that_was_seen(compared, browser, tmp_path):
    """Whoever prefers a, whatever the side, has voted for a."""
    browser.open(write_page(tmp_path / "page.html", "compare", "a and b", compared))
    click(browser, "Vote blind")

    def prefer_a() -> None:
        browser.press("1" if on_the_left(browser) == "a" else "2")

    asked = QUESTIONS - 1  # nobody is asked about the same answer twice
    prefer_a()
    browser.press("Backspace")
    browser.press("x")  # no vote
    for n in range(3):
        prefer_a()
        assert f"{n + 1} / {asked}" in browser.text(".votes")
    click(browser, "stop")
    click(browser, "continue (3 votes)")
    for _ in range(asked - 3):
        prefer_a()
    browser.press("1")  # after the last one nothing more is counted
    browser.evaluate("URL.createObjectURL = (blob) => { blob.text().then((t) => { window.kept = t; }); return '#'; }")
    click(browser, "Save")
    browser.until("window.kept")
    votes = json.loads(browser.evaluate("window.kept"))["votes"]
    (row,) = tally(votes, 2)
    assert (row["wins_a"], row["wins_b"], row["ties"]) == (asked, 0, 0)
    assert sorted(vote["question"] for vote in votes) == [0, *range(2, QUESTIONS)]


def test_sides_and_order_are_drawn(compared, browser, tmp_path):
    """With Math.random() = 0 and then 0.99, to see both; a page that draws nothing would look the same twice."""
    page = write_page(tmp_path / "page.html", "compare", "a and b", compared)
    seen = []
    for draw in ("0", "0.99"):
        browser.open(page)
        browser.evaluate(f"Math.random = () => {draw}")
        click(browser, "Vote blind")
        seen.append((browser.text(".votes .question"), on_the_left(browser)))
    assert {side for _, side in seen} == {"a", "b"}
    assert seen[0][0] != seen[1][0], "not the order of the file"


def test_what_json_lacks_is_shown_as_a_dash(compared, browser, tmp_path):
    """The BLEU of empty answers is nan: JSON.parse would stop the whole page at it."""
    compared["figures"][0]["values"][1]["value"] = float("nan")
    compared["figures"][0]["changes"][1] = dict(value=float("nan"), low=None, high=None)
    compared["models"][0]["health"]["\x1b[2J"] = float("inf")
    page = render("compare", "a <b>", compared)
    block = page.partition('id="data">')[2].partition("</script>")[0]
    assert not set(re.findall(r"NaN|Infinity|\x1b|\\u001b", block))
    assert "<title>a &lt;b&gt;</title>" in page
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.errors == [] and "–" in browser.text("table tbody")


# ---- the X-ray


def predicted(tops: list, probability: list, surprise: list, rank: list) -> dict:
    return dict(top=tops, entropy=[1.0, 2.0, 3.0], probability=probability, surprise=surprise, rank=rank)


@pytest.fixture
def looked_into() -> dict:
    """Three tokens A B C; two layers with two heads; five experts in the second layer; an adapter."""
    attention = torch.zeros(2, 2, 3, 3)
    for n in range(4):  # the last token looks at the first one with 0.1, 0.2, 0.3, 0.4
        first = 0.1 * (n + 1)
        attention[n // 2, n % 2] = torch.tensor([[1.0, 0, 0], [first, 1 - first, 0], [first, 0.5, 0.5 - first]])
    facts = dict(model("m"), layers=2, hidden_size=8, heads=2, experts=5)
    change = lambda ratio: dict(change=1.0, weight=1.0, ratio=ratio, rank=1.0)
    weights = {f"model.layers.{n}.self_attn.q_proj": change(0.01 * (n + 1)) for n in range(2)}
    top = [[[2, 0.9], [3, 0.1]], [[1, 0.8], [3, 0.2]], [[1, 0.7], [2, 0.3]]]
    other = [[[3, 0.6], [2, 0.4]]] * 3
    return dict(
        model=facts,
        stages=[],
        ids=[1, 2, 3],
        prompt_tokens=3,
        vocabulary={"1": "A", "2": "B", "3": "C"},
        next=predicted(top, [0.9, 0.2], [3.0, 24.0], [1, 2]),
        lens=[other, top, top],
        attention=_packed(attention),
        norms=dict(stream=[[1.0, 2, 3]] * 3, attention=[[1.0, 2, 3]] * 2, mlp=[[4.0, 5, 6]] * 2),
        experts=[dict(layer=1, counts=[2, 1, 0, 0, 0], mean=[0.2] * 5, chosen=[[0], [0], [1]], weights=[[0.5]] * 3)],
        lora=dict(
            weights=weights,
            divergence=[0.0, 1.0, 2.0],
            moved=[[0.0, 0.0, 0.0], [0.1, 0.2, 0.3]],
            without=predicted(other, [0.4, 0.6], [1.3, 0.7], [2, 1]),
        ),
    )


def test_every_head_shows_its_own_probabilities(looked_into, browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html", "xray", "m", looked_into))
    attention = "[...document.querySelectorAll('section')].find((s) => s.innerText.startsWith('Attention'))"
    for n in range(4):
        browser.evaluate(f"document.querySelectorAll('.heads button')[{n}].click()")
        assert f"layer {n // 2 + 1}, head {n % 2 + 1}: “C” looks at" in browser.evaluate(f"{attention}.innerText")
        shares = browser.evaluate(f"[...{attention}.querySelectorAll('.tokens i')].map((e) => e.innerText)")
        assert [float(share.rstrip("%")) for share in shares] == pytest.approx(
            [10 * (n + 1), 50, 40 - 10 * n], abs=1.01
        ), "a byte for each"


def test_what_is_expected_stands_before_what_follows(looked_into, browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html", "xray", "m", looked_into))
    assert each(browser, ".sticky .token", "style.getPropertyValue('--heat')") == ["0", "0.25", "1"]
    assert each(browser, ".sticky .token", "title") == ["", "3 bits, rank 1", "24 bits, rank 2"]
    browser.press("ArrowLeft")  # from C to B
    with_it, without = each(browser, "section:nth-of-type(2) .columns > div")
    assert "What follows is “C”, number 2 of its guesses (24 bits)" in with_it
    assert "What follows is “C”, number 1 of its guesses (0.7 bits)" in without
    bold = each(browser, "section:nth-of-type(2) .bar.actual .name")
    assert bold == ["C", "C"]
    right = each(browser, ".lens tr", "querySelectorAll('td.right').length")
    assert right == [0, 1, 1, 1], "after A, both layers expect the B that comes; the embedding a C, right only after B"


def test_dead_experts_and_changed_layers(looked_into, browser, tmp_path):
    browser.open(write_page(tmp_path / "page.html", "xray", "m", looked_into))
    text = browser.text("#page")
    assert "3 of 5 experts got no token of this text" in text and len(each(browser, ".cell.dead")) == 3
    cells = each(browser, ".cells .cell")
    assert cells[cells.index("q_proj") :][:5] == ["q_proj", "layer 1", "1%", "layer 2", "2%"]
