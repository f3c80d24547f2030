"""Requests that nobody meant, field by field and from the OpenAPI schema: none breaks the server, hangs, or is refused
in another form than OpenAI's, and the next healthy request gets the answer it always gets."""

import json
import time
from collections import Counter
from contextlib import suppress

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from serve.requests import ChatRequest
from serve.server import Limits
from tests.helpers.models import small_model
from tests.helpers.servers import running, served

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
HUNG = 30.0  # seconds: no request takes a tenth of it


@pytest.fixture(scope="module")
def server():
    limits = Limits(max_new_tokens=8, request_seconds=1.0)
    with running(served(small_model(std=0.2).eval(), capacity=256), limits=limits) as server:
        yield server


class Tally:
    """Asks, checks every answer, and counts."""

    def __init__(self, url: str):
        self.client, self.statuses, self.slowest = httpx.Client(base_url=url, timeout=HUNG), Counter(), 0.0
        self.healthy = self.answer()

    def answer(self) -> dict:
        answer = self.client.post(CHAT, json=HELLO)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def check(self, status: int, text: str, asked: object) -> None:
        self.statuses[status] += 1
        assert status < 500, f"{status} {text} to {asked!r}"[:4000]
        if status >= 400:
            error = json.loads(text)["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"], text
        if sum(self.statuses.values()) % 100 == 0:
            assert self.answer() == self.healthy

    def ask(self, path: str, content: bytes, headers: dict = JSON) -> None:
        begin = time.monotonic()
        answer = self.client.post(path, content=content, headers=headers)
        self.slowest = max(self.slowest, time.monotonic() - begin)
        if "event-stream" in answer.headers.get("content-type", ""):
            for event in filter(None, answer.text.split("\n\n")):
                data = event.removeprefix("data: ")
                assert data == "[DONE]" or "error" not in json.loads(data), f"{data} to {content!r}"[:4000]
        self.check(answer.status_code, answer.text, (path, content))

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} of {status}" for status, count in sorted(self.statuses.items()))
        return f"{sum(self.statuses.values()):,} requests: {counts}; the slowest took {self.slowest:.2f} s"


def often(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )


# ---- fields with what stands in no schema

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([1e308, -1, 0, 2**70, "5", None, True]))
TEXT = st.one_of(st.text(max_size=30), st.sampled_from(["\ud800", "\x00", "<|im_end|>", "a" * 2000, "👩‍👧", ""]))
ANY = st.recursive(
    st.one_of(NUMBERS, TEXT, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "function", "", None, 3])
CALLS = st.lists(st.fixed_dictionaries({"function": st.dictionaries(st.sampled_from(["name", "arguments"]), ANY)}))
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLES, "content": st.one_of(TEXT, ANY), "tool_calls": st.one_of(CALLS, ANY), "reasoning": ANY}
)
FIELDS = {name: ANY for name in (*ChatRequest.model_fields, "prompt", "echo", "tokens", "x")} | {
    "model": st.sampled_from(["tiny", "minimind", None, "", "../x", 3]),
    "messages": st.one_of(st.lists(MESSAGE, max_size=4), ANY),
    "prompt": st.one_of(TEXT, st.lists(st.integers(-5, 7000), max_size=5), ANY),
    "max_tokens": st.one_of(st.integers(0, 5), NUMBERS),
    "n": st.one_of(st.integers(-1, 3), NUMBERS),
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "seed": NUMBERS,
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=3), ANY),
    "stream": st.booleans(),
    "logit_bias": st.one_of(st.dictionaries(st.sampled_from(["1", "-1", "9" * 30, "²", "x", "6399"]), NUMBERS), ANY),
    "tools": st.one_of(st.lists(ANY, max_size=2), ANY),
}
GOOD = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "tokens": [5, 6], "max_tokens": 3}
CHANGE = st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name]))
BODIES = st.one_of(  # most are a good one with some fields changed: what is wrong everywhere is refused at once
    st.lists(CHANGE, max_size=1).map(lambda changes: GOOD | dict(changes)),
    st.lists(CHANGE, min_size=1, max_size=4).map(lambda changes: GOOD | dict(changes)),
    st.fixed_dictionaries({}, optional=FIELDS),
    ANY,
)
PATHS = st.sampled_from([CHAT, "/v1/completions", "/tokenize", "/detokenize"])
BYTES = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b'{"n":1e999}',
    b'{"a":' + b"[" * 5000,
    b"[" * 9000 + b"]" * 9000,
    b"1" * 9000,
]


def fuzz(url: str, examples: int) -> Tally:
    tally = Tally(url)

    @often(examples)
    @given(path=PATHS, body=BODIES)
    def ask(path, body):
        limits = {"max_tokens": 3} if isinstance(body, dict) and "max_tokens" not in body else {}
        body = body | limits if isinstance(body, dict) else body
        if path == "/tokenize" and isinstance(body, dict) and "prompt" in body:
            body = {name: value for name, value in body.items() if name != "messages"}  # it wants one of the two
        tally.ask(path, json.dumps(body).encode())

    ask()
    for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
        for content in BYTES:
            tally.ask(path, content)
            tally.ask(path, content, {"Content-Type": "text/plain"})
    assert tally.answer() == tally.healthy
    return tally


def test_no_request_breaks_the_server(server):
    assert fuzz(server.url, 60).statuses[200]


@pytest.mark.soak
def test_ten_thousand_requests_do_not_break_the_server(server, capsys):
    tally = fuzz(server.url, 10_000)
    with capsys.disabled():
        print(f"\nhypothesis: {tally}")


# ---- the schema that the server publishes


@pytest.mark.soak
def test_ten_thousand_requests_by_the_schema(server, capsys):
    """By schemathesis: as the schema has it, and not quite. 1,000 of each kind for each path that takes a body, of
    which there is much to get wrong; 30 for the others."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs pip install schemathesis")
    requests = pytest.importorskip("requests")
    tally, paths, session = Tally(server.url), 0, requests.Session()
    for operation in schemathesis.openapi.from_url(server.url + "/openapi.json").get_all_operations():
        for mode in schemathesis.GenerationMode:
            paths += 1

            @often(1000 if operation.ok().body else 30)
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def ask(case):
                begin = time.monotonic()
                answer = case.call(base_url=server.url, session=session, timeout=HUNG)
                tally.slowest = max(tally.slowest, time.monotonic() - begin)
                tally.check(answer.status_code, answer.text, case)

            with suppress(Unsatisfiable):  # a path without fields has nothing to get wrong
                ask()
    with capsys.disabled():
        print(f"\nschemathesis, {paths} kinds: {tally}")
    assert tally.answer() == tally.healthy
