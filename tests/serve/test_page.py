"""The chat page in a browser, with a model that says what it is told to say. Nothing of what it says may run."""

import json
import re
import time

import httpx
import pytest

from inference.tools import ROUNDS
from serve.guard import Rules
from serve.static import FOLDER, PAGES, POLICY
from tests.helpers.models import TOKENIZER as tokenizer
from tests.helpers.models import small_model
from tests.helpers.servers import Parrot, running, served

HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'><svg onload=\"window.hit = 1\">\n\n"
    "[click](javascript:window.hit=1) **<b>bold</b>** `<i>code</i>` <a href='javascript:window.hit=1'>a</a>\n\n"
    "```html\n<iframe srcdoc='<script>parent.hit = 1</script>'></iframe>\n```\n"
    "- <meta http-equiv=refresh content='0;url=https://evil.example'>\n"
    "![pixel](https://evil.example/pixel.png) \x1b[31mred\x1b]0;title\x07 user\u202egpj.exe"
)


@pytest.fixture(scope="module")
def server():
    parrot = Parrot(small_model(max_position_embeddings=2048).config)
    with running(served(parrot, rows=1, capacity=1500), served(parrot, name="other", rows=1, base="tiny")) as server:
        server.parrot = parrot
        yield server


@pytest.fixture
def page(browser, server):
    """The page, without anything kept from another test."""
    server.parrot.seconds = 0.0
    browser.open(server.url + "/")
    browser.evaluate("localStorage.clear(); sessionStorage.clear()")
    browser.open(server.url + "/")
    browser.until("document.querySelector('#model').options.length == 2")
    return browser


def says(server, text):
    server.parrot.script = tokenizer.encode(text) if isinstance(text, str) else text


IDLE = "document.querySelector('#stop').hidden"


def ask(page, text, wait=True):
    page.evaluate(f"document.querySelector('#question').value = {json.dumps(text)}")
    page.evaluate("document.querySelector('#ask').requestSubmit()")
    if wait:
        page.until(IDLE)


def answers(page):
    return page.evaluate("[...document.querySelectorAll('article.assistant .text')].map((e) => e.innerText.trim())")


def questions(page):
    return page.evaluate("[...document.querySelectorAll('article.user .text')].map((e) => e.innerText)")


# ---- the files


def test_every_file_is_served_under_a_strict_policy_and_names_nothing_elsewhere(server):
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(PAGES.values())
    for path in PAGES:
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200 and answer.headers["content-security-policy"] == POLICY
        assert "charset=utf-8" in answer.headers["content-type"] or path.endswith(".svg")
        elsewhere = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", answer.text.replace("http://www.w3.org/2000/svg", ""))
        assert not elsewhere, f"{path}: {elsewhere}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", answer.text), path
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/page.py"):
        assert httpx.get(server.url + path).status_code == 404


def test_both_languages_have_every_word(page):
    words = page.evaluate(
        "import('./page/words.js').then(({ WORDS }) => [Object.keys(WORDS.en), Object.keys(WORDS.zh)])"
    )
    assert words[0] == words[1]
    files = [path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.name != "words.js"]
    used = r"data-(?:word|label|placeholder)=\"(\w+)\"|word\('(\w+)'\)|button\('(\w+)'"
    used = {name for names in re.findall(used, "".join(files)) for name in names if name}
    assert used <= set(words[0]) and len(used) > 40
    assert page.evaluate("[...document.querySelectorAll('#settings span, #settings option')].every((e) => e.innerText)")


# ---- what a model says is text


def test_hostile_text_is_shown_and_does_nothing(page, server):
    """The same text in a question, an answer and a thought; also after it was kept and read again."""
    think, end = tokenizer.control["<think>"], tokenizer.control["</think>"]
    says(server, [think, *tokenizer.encode(HOSTILE), end, *tokenizer.encode(HOSTILE)])
    ask(page, HOSTILE)
    for again in (False, True):
        if again:
            page.open(server.url + "/")
            page.until("document.querySelectorAll('article').length == 2")
        (answer,) = answers(page)
        for piece in (
            "<script>window.hit = 1</script>",
            "<img src=x onerror=",
            "[click](javascript:",
            "<iframe srcdoc=",
        ):
            assert piece in answer and piece in questions(page)[0]
        assert r"\u001b[31mred" in answer and r"user\u202egpj.exe" in answer
        tags = page.evaluate("[...new Set([...document.querySelectorAll('#messages *')].map((e) => e.tagName))]")
        known = "ARTICLE DIV P PRE CODE STRONG UL LI DETAILS SUMMARY FOOTER BUTTON SPAN"
        assert set(tags) <= set(known.split())
        assert page.evaluate("[document.querySelector('.assistant .text strong').innerText, window.hit ?? null]") == [
            "<b>bold</b>",
            None,
        ]
        assert page.evaluate("document.querySelector('details').textContent").count("<iframe") == 1
        assert all(url.startswith(server.url) for url in page.requests) and not page.errors
        assert page.evaluate("location.href") == server.url + "/"


def test_the_policy_stops_what_the_page_would_let_through(page):
    """A second wall: even code of ours that made HTML of text could not."""
    page.evaluate("window.refused = ''")
    page.evaluate("try { document.body.innerHTML = '<b>x</b>' } catch (error) { window.refused = error.name }")
    assert page.evaluate("window.refused") == "TypeError"
    page.evaluate("void fetch('https://evil.example/').catch((error) => { window.refused = 'fetch' })")
    page.until("window.refused == 'fetch'")


def test_markdown(page, server):
    says(
        server,
        "# Title\n\nOne **bold** and `code`\nsame\n\n1. a\n2. b **c**\n\n- d\n\n```py\nx = '**no**'\n```\n2 ** 3 `open",
    )
    ask(page, "hi")
    html = page.evaluate("document.querySelector('.assistant .text').innerHTML.replace(/<button.*?<\\/button>/, '')")
    assert html == (
        "<h3>Title</h3><p>One <strong>bold</strong> and <code>code</code>\nsame</p>"
        '<ol start="1"><li>a</li><li>b <strong>c</strong></li></ol><ul><li>d</li></ul>'
        "<pre><code>x = '**no**'</code></pre><p>2 ** 3 `open</p>"
    )


# ---- conversations


def test_edit_again_and_the_versions_of_a_message(page, server):
    says(server, "first")
    ask(page, "one")
    says(server, "second")
    page.click("article.assistant button[title=Again]")
    page.until(IDLE)
    assert answers(page) == ["second"] and "2/2" in page.text("article.assistant footer")
    page.click("button[title='Previous version']")
    assert answers(page) == ["first"]
    page.press("ArrowUp")  # in the empty box: edits the last question
    page.until("document.querySelector('.edit textarea')?.value == 'one'")
    says(server, "third")
    page.evaluate("document.querySelector('.edit textarea').value = 'two'")
    page.click(".edit button[type=submit]")
    page.until(IDLE)
    assert (questions(page), answers(page)) == (["two"], ["third"])
    page.click("article.user button[title='Previous version']")
    assert (questions(page), answers(page)) == (["one"], ["first"])  # the branch is as it was left
    page.open(server.url + "/")
    page.until("document.querySelectorAll('article').length == 2")
    assert (questions(page), answers(page)) == (["one"], ["first"])


def test_thoughts_stay_unfolded_while_they_grow_and_after(page, server):
    server.parrot.seconds = 0.02
    think, end = tokenizer.control["<think>"], tokenizer.control["</think>"]
    says(server, [think, *tokenizer.encode("hm " * 40), end, *tokenizer.encode("fine")])
    ask(page, "why?", wait=False)
    page.until("document.querySelector('summary')?.innerText == 'Thinking …'")
    assert not page.evaluate("document.querySelector('details').open")
    page.click("summary")
    page.until(IDLE)
    assert page.evaluate("document.querySelector('details').open") and page.text("details").count("hm") == 40
    assert answers(page) == ["fine"]


def test_an_answer_streams_and_stops(page, server):
    server.parrot.seconds = 0.02
    says(server, "word " * 400)
    ask(page, "go on", wait=False)
    page.until("document.querySelector('.assistant .text')?.innerText.includes('word word word')")
    page.press("Escape")
    page.until(IDLE)
    assert "stopped" in page.text(".figures") and 3 <= answers(page)[0].count("word") < 300
    end = time.monotonic() + 5
    while server.state.table["tiny"].engine.busy:
        assert time.monotonic() < end, "the server goes on"
        time.sleep(0.01)


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_deleted(page, server):
    """The end of its answer put it back into the list, and into the browser's storage."""
    server.parrot.seconds = 0.02
    says(server, "word " * 400)
    ask(page, "go on", wait=False)
    page.until("document.querySelector('.assistant .text')?.innerText.includes('word word')")
    page.evaluate("window.confirm = () => true")
    page.click("#list button[title=Delete]")
    page.until(IDLE)
    kept = "Object.keys(localStorage).filter((key) => key.startsWith('sparrow.conversation'))"
    assert page.evaluate(kept) == [] and page.evaluate("document.querySelectorAll('#list .row').length") == 0
    assert page.text("#messages").startswith("Ask the model something") and not page.errors


def test_a_full_browser_is_told_also_after_an_import(page, server, tmp_path):
    """Choosing what was imported took the notice away."""
    says(server, "fine")
    ask(page, "hi")
    file = tmp_path / "conversations.json"
    file.write_text(page.evaluate("import('./page/conversations.js').then((talk) => talk.toFile(talk.saved()))"))
    page.evaluate("Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError') }")
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
    page.until("document.querySelectorAll('#list .row').length == 2")
    assert "no room left" in page.text("#notice") and questions(page) == ["hi"]


def test_settings_and_the_model_reach_the_server(page, server):
    page.evaluate(
        "window.bodies = []; const plain = window.fetch;"
        "window.fetch = (url, options) => { window.bodies.push(options.body); return plain(url, options); }"
    )
    page.click("#open")
    page.evaluate("document.querySelector('#system').value = 'Be brief.'")
    page.evaluate("document.querySelector('[name=temperature]').value = '.5'")
    page.evaluate("document.querySelector('[name=enable_thinking]').value = 'false'")
    page.click("dialog button")
    page.until("localStorage['sparrow.settings']?.includes('.5')")
    page.evaluate("document.querySelector('#model').value = 'other'")
    says(server, "word " * 20)
    ask(page, "hi")
    body = json.loads(page.evaluate("window.bodies.at(-1)"))
    assert body == {
        "model": "other",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "enable_thinking": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    number = len(tokenizer.encode("word " * 20))
    assert re.match(rf"other · {number} tokens( · [\d.]+ tokens/s)? · \d+\.\d\d s to the first$", page.text(".figures"))


def test_the_figures_below_an_answer(page):
    """By a clock of the test's: half a second to the first token, and two more for all 41."""
    figures = page.evaluate(
        """import('./page/answers.js').then(async ({ answerInto, figures }) => {
          const message = { model: 'other', content: '', reasoning: '' };
          const chunk = (more) => new TextEncoder().encode(`data: ${JSON.stringify({ choices: [], ...more })}\\n\\n`);
          const said = (content) => chunk({ choices: [{ delta: { content }, finish_reason: 'stop' }] });
          const chunks = [[500, said('a')], [1500, said('b')], [2500, chunk({ usage: { completion_tokens: 41 } })]];
          let now = 0;
          performance.now = () => now;
          const pull = async (body) => {
            const number = 3 - chunks.length; // of those that were sent: the page has to read them at their time
            while (message.content.length < Math.min(number, 2)) await new Promise((done) => setTimeout(done, 1));
            if (!chunks.length) return body.close();
            const [time, content] = chunks.shift();
            now = time;
            body.enqueue(content);
          };
          window.fetch = async () => new Response(new ReadableStream({ pull }, { highWaterMark: 0 }));
          await answerInto(message, {}, '', undefined, () => {});
          return figures(message);
        })"""
    )
    assert figures == "other · 41 tokens · 21 tokens/s · 0.50 s to the first"


def test_files_go_out_and_in_and_a_hostile_one_is_cleaned(page, server):
    says(server, "fine")
    ask(page, "hi")
    with_file = "import('./page/conversations.js').then((talk) => {0})"
    text = page.evaluate(with_file.replace("{0}", "talk.toFile(talk.saved())"))
    same = page.evaluate(with_file.replace("{0}", f"talk.fromFile({json.dumps(text)})"))
    kept = json.loads(text)["conversations"]
    assert [{**one, "id": 0, "changed": 0} for one in same] == [{**one, "id": 0, "changed": 0} for one in kept]
    bad = (
        {"role": "system", "content": "x"},
        {"role": "user", "content": {"a": 1}, "onclick": "x", "shown": 99},
        None,
        3,
    )
    hostile = {
        "format": "sparrow conversations",
        "conversations": [{"id": "../x", "replies": bad, "shown": -5}, None, 7],
    }
    (cleaned,) = page.evaluate(with_file.replace("{0}", f"talk.fromFile({json.dumps(json.dumps(hostile))})"))
    assert cleaned["shown"] == 0 and re.fullmatch(r"\w+", cleaned["id"])
    assert cleaned["replies"] == [{"role": "user", "content": "", "reasoning": "", "replies": [], "shown": 0}]


def called(name, arguments):
    """The ids of a tool call, as a model that was trained on them writes it."""
    body = json.dumps({"name": name, "arguments": arguments})
    tags = [tokenizer.control[tag] for tag in ("<tool_call>", "</tool_call>")]
    return [tags[0], *tokenizer.encode(f"\n{body}\n"), tags[1]]


def with_tools(page, server):
    page.evaluate("localStorage.setItem('sparrow.settings', JSON.stringify({ tools: 'demo' }))")
    page.open(server.url + "/")
    page.until("document.querySelector('#model').options.length == 2")


def test_a_tool_is_called_and_its_result_answered(page, server):
    """The browser waits with the call until the model has its next words."""
    with_tools(page, server)
    page.evaluate(
        "window.bodies = []; const plain = window.fetch; window.fetch = async (url, options) => {"
        "  if (options.body) window.bodies.push(options.body);"
        "  while (options.body && url === 'tools/demo' && !window.go) await new Promise((r) => setTimeout(r, 10));"
        "  return plain(url, options); }"
    )
    says(server, called("calculator", {"expression": "30 * 365 / 1000"}))
    ask(page, "How much is it?", wait=False)
    page.until("window.bodies.length == 2")
    says(server, "It is 10.95 kg.")
    page.evaluate("window.go = true")
    page.until(IDLE)
    assert answers(page) == ["It is 10.95 kg."] and page.text("article.tool") == "10.95"
    assert page.text(".call") == 'calculator({"expression": "30 * 365 / 1000"})'
    first, call, second = (json.loads(body) for body in page.evaluate("window.bodies"))
    assert [tool["function"]["name"] for tool in first["tools"]] == ["calculator", "date"]
    assert call == {"name": "calculator", "arguments": '{"expression": "30 * 365 / 1000"}'}
    asked, answer, result = second["messages"]
    assert (asked["role"], answer["tool_calls"][0]["function"]) == ("user", call)
    assert result == {"role": "tool", "content": "10.95", "tool_call_id": answer["tool_calls"][0]["id"]}
    page.open(server.url + "/")
    page.until("document.querySelectorAll('article').length == 4")
    assert page.text("article.tool") == "10.95" and "calculator" in page.text(".call"), "it is kept"
    assert not page.errors


def test_a_model_that_only_calls_tools_is_stopped_and_its_calls_are_text(page, server):
    evil = "<img src=x onerror=window.hit=1>\u202e\x1b[31m"
    with_tools(page, server)
    says(server, called(evil, {evil: evil}))
    ask(page, "go")
    assert page.evaluate("document.querySelectorAll('article.tool').length") == ROUNDS
    assert "No further round of tool calls" in page.text(".error")
    shown = r"<img src=x onerror=window.hit=1>\u202e\u001b[31m"
    assert shown in page.text(".call") and "error: there is no tool '<img src=x onerror" in page.text("article.tool")
    assert page.evaluate("window.hit ?? null") is None and not page.evaluate("document.images.length")
    assert not page.errors


def test_after_an_empty_answer_the_conversation_goes_on(page, server):
    """One of blanks alone is refused by the server as an assistant that says nothing."""
    says(server, " \n ")
    ask(page, "one")
    assert "The answer is empty" in page.text("article.assistant .error")
    says(server, "fine")
    ask(page, "two")
    assert answers(page)[-1] == "fine" and page.text(".error").strip() == "The answer is empty."


def test_what_went_wrong_is_said(page, server):
    ask(page, "word " * 1600)
    assert "maximum context length" in page.text("article.assistant .error")


def test_a_server_with_a_key_asks_for_it(browser):
    parrot = Parrot(small_model().config)
    with running(served(parrot, rows=1), rules=Rules(key="secret")) as server:
        assert httpx.get(server.url + "/v1/models").status_code == 401
        browser.open(server.url + "/")
        browser.until("document.querySelector('#settings').open && !document.querySelector('#key_row').hidden")
        browser.evaluate("document.querySelector('#api_key').value = 'secret'")
        browser.click("dialog button")
        browser.until("document.querySelector('#model').value == 'tiny'")
        parrot.script = tokenizer.encode("fine")
        ask(browser, "hi")
        assert answers(browser) == ["fine"] and "secret" not in browser.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize(
    "language, width, send", [("zh-CN", 390, "发送"), ("en-US", 390, "Send"), ("en-US", 1000, "Send")]
)
def test_languages_and_widths(page, server, language, width, send):
    says(server, "a" * 300 + "\n\n```\n" + "b" * 300 + "\n```")
    page.open(server.url + "/", width=width, language=language)
    ask(page, "x" * 300)
    assert page.text("#send") == send
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert page.evaluate("getComputedStyle(document.querySelector('#side')).display") == (
        "none" if width < 500 else "flex"
    )
