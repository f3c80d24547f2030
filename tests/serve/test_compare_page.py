"""Two models side by side in a browser: both at once, nameless until the vote, votes that the sign test can read."""

import json
import time

import pytest

from evaluation.votes import as_text, read_page_votes, tally
from tests.helpers.models import TOKENIZER as tokenizer
from tests.helpers.models import small_model
from tests.helpers.servers import Parrot, running, served

IDLE = "document.querySelector('#stop').hidden"
EVIL = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit=1'> [a](javascript:window.hit=1) \x1b[31m \u202egpj"
)


@pytest.fixture(scope="module")
def server():
    config = small_model(max_position_embeddings=2048).config
    parrots = {"alpha": Parrot(config), "beta": Parrot(config)}
    with running(*(served(parrot, name, rows=1, capacity=1500) for name, parrot in parrots.items())) as server:
        server.parrots = parrots
        yield server


@pytest.fixture
def page(browser, server):
    """The page, without anything kept from another test; each model says its name."""
    browser.open(server.url + "/compare")
    browser.evaluate("localStorage.clear(); sessionStorage.clear()")
    for name, parrot in server.parrots.items():
        parrot.script, parrot.seconds = tokenizer.encode(f"I am {name}"), 0.0
    reopen(browser, server)
    return browser


def reopen(page, server, **look):
    page.open(server.url + "/compare", **look)
    page.until("document.querySelector('#second').value == 'beta'")


def ask(page, text, wait=True):
    page.evaluate(f"document.querySelector('#question').value = {json.dumps(text)}")
    page.evaluate("document.querySelector('#ask').requestSubmit()")
    if wait:
        page.until(IDLE)


def sides(page):
    return page.evaluate(
        "[...document.querySelectorAll('.turn:last-of-type .side .text')].map((e) => e.innerText.trim())"
    )


def titles(page):
    return page.evaluate("[...document.querySelectorAll('.turn:last-of-type .side h2')].map((e) => e.innerText)")


def not_blind(page):
    page.click("#blind")
    assert not page.evaluate("document.querySelector('#blind').checked")


def saved(page, what):
    return page.evaluate(f"import('./page/votes.js').then((votes) => votes.{what}(votes.saved()))")


def test_nobody_sees_which_is_which_until_the_vote(page, server, tmp_path):
    """Twelve blind votes for whoever says "alpha": both sides come up, and the files name the models."""
    left = set()
    for n in range(12):
        ask(page, f"question {n}")
        said = sides(page)
        assert sorted(said) == ["I am alpha", "I am beta"] and titles(page) == ["Left", "Right"]
        assert page.evaluate("document.querySelectorAll('.turn').length") == 1, "after a vote, a new conversation"
        shown = page.text("#messages")
        assert "tokens" not in shown, "nor how fast it was"
        left.add(said[0])
        choice = "left" if said[0] == "I am alpha" else "right"
        page.click(f"#vote button[data-choice={choice}]")
        names = ["alpha ★", "beta"] if choice == "left" else ["beta", "alpha ★"]
        assert titles(page) == names and page.evaluate("document.querySelector('#vote').hidden")
    assert len(left) == 2, "1 in 2048 that a coin falls so"
    reopen(page, server)
    assert page.text("#votes summary") == "Votes (12)"
    file = tmp_path / "votes.json"
    file.write_text(saved(page, "toFile"), encoding="utf-8")
    names, votes = read_page_votes([file])
    text = as_text(tally(votes, len(names)), names)
    assert "alpha preferred 12 times" in text or "beta preferred 0 times, alpha 12 times" in text
    assert "p = 0.000488" in text  # 2 / 2^12
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["questions"][3]["prompt"] == "question 3" and content["questions"][3]["blind"] is True
    assert content["questions"][3]["answers"] == {"alpha": "I am alpha", "beta": "I am beta"}
    pair = json.loads(saved(page, "toPairs").splitlines()[3])
    assert pair["chosen"] == [{"role": "user", "content": "question 3"}, {"role": "assistant", "content": "I am alpha"}]
    assert pair["rejected"][-1]["content"] == "I am beta"


def test_in_the_open_each_model_sees_its_own_answers(page, server):
    not_blind(page)
    page.evaluate(
        "window.bodies = []; const plain = window.fetch;"
        "window.fetch = (url, options) => { window.bodies.push(JSON.parse(options.body)); return plain(url, options); }"
    )
    ask(page, "one")
    assert titles(page) == ["alpha", "beta"] and "tokens" in page.text(".side .figures")
    ask(page, "two")
    assert sides(page) == ["I am alpha", "I am beta"]
    for body in page.evaluate("window.bodies.slice(2)"):
        assert [message["content"] for message in body["messages"]] == ["one", f"I am {body['model']}", "two"]
    page.click("#vote button[data-choice=tie]")
    ask(page, "three")
    assert page.evaluate("document.querySelectorAll('.turn').length") == 3
    content = json.loads(saved(page, "toFile"))
    assert content["votes"] == [{"question": 0, "left": 0, "right": 1, "choice": "tie"}]
    assert content["questions"][0]["earlier"] == [{"question": "one", "answers": ["I am alpha", "I am beta"]}]
    assert saved(page, "toPairs") == "", "a tie prefers nothing"


def test_both_stream_at_once_and_stop(page, server):
    for parrot in server.parrots.values():
        parrot.script, parrot.seconds = tokenizer.encode("word " * 300), 0.01
    ask(page, "go on", wait=False)
    both = "[...document.querySelectorAll('.side .text')].map((e) => e.innerText.split('word').length - 1)"
    page.until(f"Math.min(...{both}) > 3")
    counts = page.evaluate(both)
    assert len(counts) == 2 and max(counts) < 150 and page.evaluate("document.querySelector('#vote').hidden")
    page.press("Escape")
    page.until(IDLE)
    end = time.monotonic() + 5
    while any(one.engine.busy for one in server.state.table.values()):
        assert time.monotonic() < end, "the server goes on"
        time.sleep(0.01)


def test_a_vote_by_keyboard(page):
    ask(page, "one")
    assert page.evaluate("document.activeElement.id") == "vote"
    page.press("2")
    page.until("!document.querySelector('#votes').hidden")
    assert titles(page)[1].endswith("★") and page.evaluate("document.activeElement.id") == "question"
    page.press("1")  # typed into the box: no vote
    assert page.text("#votes summary") == "Votes (1)"


def test_hostile_answers_and_names_are_text(page, server):
    not_blind(page)
    for parrot in server.parrots.values():
        parrot.script = tokenizer.encode(EVIL)
    ask(page, EVIL)
    assert all(
        "<script>window.hit = 1</script><img" in text and r"\u001b[31m \u202egpj" in text for text in sides(page)
    )
    tags = set(page.evaluate("[...document.querySelectorAll('#messages *')].map((e) => e.tagName)"))
    assert tags <= set("ARTICLE SECTION DIV H2 P SPAN".split())
    page.click("#vote button[data-choice=left]")
    vote = dict(choice="left", left=EVIL, right="b", turns=[dict(question=EVIL, answers=["a", "b"])], at=1)
    page.evaluate(f"localStorage.setItem('sparrow.vote.x', {json.dumps(json.dumps(vote))})")
    page.evaluate("localStorage.setItem('sparrow.vote.y', '{')")
    reopen(page, server)
    assert page.text("#votes summary") == "Votes (2)"
    page.evaluate("document.querySelector('#votes').open = true")
    assert "<script>window.hit = 1</script>" in page.text("#votes table")
    assert page.evaluate("window.hit ?? null") is None and not page.evaluate("document.images.length")
    assert all(url.startswith(server.url) for url in page.requests) and not page.errors


def test_two_different_models_are_needed(page, server):
    page.evaluate("const box = document.querySelector('#second'); box.value = 'alpha'; box.onchange()")
    assert page.text("#notice") == "Choose two different models."
    ask(page, "hi")
    assert not page.evaluate("document.querySelectorAll('.turn').length")


@pytest.mark.parametrize("language, width, send", [("zh-CN", 390, "发送"), ("en-US", 1000, "Send")])
def test_languages_and_widths(page, server, language, width, send):
    for parrot in server.parrots.values():
        parrot.script = tokenizer.encode("a" * 300 + "\n\n```\n" + "b" * 300 + "\n```")
    reopen(page, server, width=width, language=language)
    ask(page, "x" * 300)
    assert page.text("#send") == send
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    below = page.evaluate(
        "document.querySelectorAll('.side')[1].offsetTop > document.querySelectorAll('.side')[0].offsetTop"
    )
    assert below == (width < 500)
