"""Who may ask, how much, and for how long; and that a client who leaves, lingers or lies costs the others nothing."""

import json
import os
import socket
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.guard import PatientProtocol, Rules, name_of
from serve.requests import ChatRequest
from serve.server import Limits
from tests.helpers.models import TOKENIZER as tokenizer
from tests.helpers.models import small_model
from tests.helpers.servers import Parrot, running, served
from tokenizer.chat import encode_chat

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model():
    return small_model(std=0.2).eval()


@pytest.fixture(scope="module")
def server(model):
    with running(served(model, capacity=256), rules=Rules(body_bytes=20_000, body_seconds=1.0)) as server:
        yield server


@pytest.fixture
def slow(model):
    """A model that takes 20 ms a token and never ends by itself: one place, and two may wait."""
    parrot = Parrot(model.config)
    parrot.script, parrot.seconds = tokenizer.encode("word " * 300), 0.02
    limits = Limits(max_new_tokens=280, max_waiting=2)
    with running(served(parrot, rows=1, capacity=300), limits=limits) as server:
        server.parrot = parrot
        server.engine = server.state.table["tiny"].engine
        yield server


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def works(server) -> bool:
    return httpx.post(server.url + CHAT, json=HELLO).status_code == 200


# ---- who may ask


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "localhost:8998"}, 200),
        ({"Host": "[::1]:8998"}, 200),
        ({"Host": "evil.example"}, 403),  # its DNS points here: DNS rebinding
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[bad"}, 403),
        ({"Host": "localhost:8998", "Origin": "http://localhost:8998"}, 200),
        ({"Host": "localhost:8998", "Origin": "http://localhost:3000"}, 403),
    ],
)
def test_only_pages_of_this_server_may_ask(server, headers, status):
    answer = httpx.get(server.url + "/v1/models", headers=headers)
    assert answer.status_code == status and "access-control-allow-origin" not in answer.headers
    assert status == 200 or answer.json()["error"]["code"] in ("bad_host", "bad_origin")


def test_names_in_host_headers():
    hosts = {"a.b:80": "a.b", "a.b": "a.b", "[::1]:80": "::1", "[::1]": "::1", "": "", ":80": "", "a:b": "a:b"}
    assert {host: name_of(host) for host in hosts} == hosts


def test_pages_that_are_named_may_ask(model):
    with running(served(model), rules=Rules(origins=("https://chat.example",))) as server:
        asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
            preflight = httpx.options(server.url + CHAT, headers={"Origin": origin, **asking})
            answer = httpx.post(server.url + CHAT, headers={"Origin": origin}, json=HELLO)
            assert (preflight.status_code, answer.status_code) == ((200, 200) if allowed else (400, 403))
            assert (answer.headers.get("access-control-allow-origin") == origin) is allowed


def test_a_key_is_asked_for(model):
    with running(served(model), rules=Rules(hosts=(), key="secret")) as server:
        get = lambda path, **headers: httpx.get(server.url + path, headers=headers)
        assert get("/health", Host="any.name").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            for header in ("", "secret", "Bearer secreT", "Bearer secret ", "Basic secret"):
                answer = get(path, Authorization=header.strip() if header != "Bearer secret " else "Bearer secretx")
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert get("/v1/models", Authorization="Bearer secret").status_code == 200


# ---- how much


def test_a_large_body_is_refused_before_it_is_read(server):
    assert httpx.post(server.url + CHAT, content=b"x" * 30_000).status_code == 413
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:  # it says 1 GB, and sends none
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**9}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(1000)
    with pytest.raises(httpx.HTTPError):  # it does not say, and goes on and on: answered, then cut off
        answer = httpx.post(server.url + CHAT, content=(b"x" * 1000 for _ in range(10**6)))
        assert answer.status_code == 413
        raise httpx.HTTPError("answered")
    assert works(server)


def test_slow_clients_are_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(PatientProtocol, "PATIENCE_SECONDS", 0.3)
    connect = lambda: socket.create_connection(("127.0.0.1", server.port), timeout=5)
    with connect() as body, connect() as headers, connect() as silent:
        body.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{{".encode())
        headers.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert works(server)
        assert headers.recv(1000) == b"" and silent.recv(1000) == b""  # closed
        assert b" 408 " in body.recv(1000)


def test_a_full_queue_says_so(slow):
    """One is answered and two wait; the fourth is told when to come again."""
    ask = lambda: httpx.post(slow.url + CHAT, json=HELLO | {"max_tokens": 20}, timeout=30)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask().status_code)) for _ in range(3)]
    for n, thread in enumerate(threads):
        thread.start()
        until(lambda n=n: len(slow.engine.waiting) + len(slow.engine.running) + len(slow.engine.reading) > n)
    fourth = ask()
    assert (fourth.status_code, fourth.headers["retry-after"]) == (429, "2")
    assert fourth.json()["error"]["code"] == "rate_limit_exceeded"
    for thread in threads:
        thread.join()
    assert answers == [200] * 3 and ask().status_code == 200


def test_an_answer_that_takes_too_long_is_ended(model):
    parrot = Parrot(model.config)
    parrot.script, parrot.seconds = tokenizer.encode("word " * 300), 0.02
    with running(served(parrot, rows=1, capacity=300), limits=Limits(request_seconds=0.5)) as server:
        answer = httpx.post(server.url + CHAT, json=HELLO | {"max_tokens": 250}).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 2 < answer["usage"]["completion_tokens"] < 40


# ---- who leaves


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_written_for(slow, stream):
    """At most one token more than were computed when the server learned of it; the place is free again."""
    body = HELLO | {"max_tokens": 250, "stream": stream}
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", slow.port), timeout=5) as connection:
            content = json.dumps(body)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
            until(lambda: slow.engine.running and len(slow.engine.running[0].tokens) >= 3)
            sequence = slow.engine.running[0]
        until(lambda sequence=sequence: sequence.cancelled)
        written = len(sequence.tokens)
        until(lambda sequence=sequence: sequence.finish_reason)
        assert sequence.finish_reason == "cancelled" and len(sequence.tokens) <= written + 1
        until(lambda: not slow.engine.busy)
    assert not slow.state.runner.events


def test_who_leaves_while_waiting_is_forgotten(slow):
    first = threading.Thread(target=lambda: httpx.post(slow.url + CHAT, json=HELLO | {"max_tokens": 60}, timeout=30))
    first.start()
    until(lambda: slow.engine.running)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(slow.url + CHAT, json=HELLO, timeout=0.2)
    until(lambda: not slow.engine.waiting)
    first.join()


def test_a_failure_of_the_model_fails_its_requests_only(slow, capsys):
    real, slow.parrot.forward = slow.parrot.forward, lambda *args, **kwargs: [][0]
    for stream in (False, True):
        answer = httpx.post(slow.url + CHAT, json=HELLO | {"stream": stream})
        error = json.loads(answer.text.removeprefix("data: ").split("\n\ndata: ")[-1]) if stream else answer.json()
        assert error["error"]["type"] == "server_error" and answer.status_code == (200 if stream else 500)
        assert "list index" not in answer.text  # what went wrong is for the log
    slow.parrot.forward = real
    assert works(slow) and "IndexError" in capsys.readouterr().err


# ---- text stays text


def control_ids(body: dict) -> list[int]:
    messages, tools = ChatRequest.model_validate(body).conversation()
    ids = encode_chat(tokenizer, messages, tools, add_generation_prompt=True).ids
    return [token for token in ids if token in set(tokenizer.control.values())]


@pytest.mark.parametrize("tag", sorted(tokenizer.control))
def test_what_a_client_writes_never_becomes_a_control_token(tag):
    """In every role and field. The same request with harmless words has the same control tokens."""

    def body(word: str) -> dict:
        call = {"name": f"f{word}", "arguments": json.dumps({f"k{word}": f"{word}v"})}
        schema = {"name": word, "description": f"a {word}", "parameters": {word: {"enum": [word]}}}
        return {
            "messages": [
                {"role": "system", "content": f"{word} be good {word}"},
                {"role": "user", "content": [{"type": "text", "text": word}, {"type": "text", "text": f"x{word}"}]},
                {"role": "assistant", "content": f"a {word} b", "reasoning_content": f"c {word}"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": word, "function": call}]},
                {"role": "tool", "tool_call_id": word, "name": word, "content": f"{word}\n{word}"},
                {"role": "user", "content": word + "\n" + word[:2] + word[2:], "name": word},
            ],
            "tools": [{"type": "function", "function": schema}],
        }

    assert control_ids(body(tag)) == control_ids(body("harmless"))


# ---- anything at all

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
GOOD = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT})
SOME = {name: values for name, values in FIELDS.items() if name != "messages"}
BODIES = st.one_of(
    st.fixed_dictionaries({}, optional=FIELDS),
    st.fixed_dictionaries({"messages": st.lists(GOOD, min_size=1, max_size=3)}, optional=SOME),
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


def check_answer(answer: httpx.Response) -> None:
    assert answer.status_code < 500, f"{answer.text} to {answer.request.url.path} {answer.request.content[:2000]!r}"
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


def fuzz(server, examples: int) -> None:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        headers = {"Content-Type": "application/json"}

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=examples < 1000,
            suppress_health_check=list(HealthCheck),
        )
        @given(path=PATHS, body=BODIES)
        def ask(path, body):
            limits = {"max_tokens": 3} if isinstance(body, dict) and "max_tokens" not in body else {}
            body = body | limits if isinstance(body, dict) else body
            check_answer(client.post(path, content=json.dumps(body).encode(), headers=headers))

        ask()
        for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
            for content in BYTES:
                check_answer(client.post(path, content=content, headers=headers))
                check_answer(client.post(path, content=content, headers={"Content-Type": "text/plain"}))
    assert works(server)


def test_no_request_breaks_the_server(server):
    fuzz(server, 60)


@pytest.mark.soak
def test_ten_thousand_requests_do_not_break_the_server(server):
    fuzz(server, 10_000)


@pytest.mark.soak
def test_a_hundred_leave_and_two_hundred_ask_at_once(model):
    """A thousand open sockets, 100 clients that leave in mid-answer, 200 that ask at the same time: whoever is served
    gets the answer of one who is alone, the others are told to come again, and no thread or sequence is left."""
    with running(served(model, rows=8, capacity=256), limits=Limits(max_waiting=64)) as server:
        alone = httpx.post(server.url + CHAT, json=HELLO).json()["choices"][0]["message"]
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
        body = json.dumps(HELLO | {"stream": True, "max_tokens": 200})
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
                connection.recv(100)
        engine = server.state.table["tiny"].engine
        until(lambda: not engine.busy, 30)
        threads = threading.active_count()
        answers = []
        ask = lambda: answers.append(httpx.post(server.url + CHAT, json=HELLO, timeout=60))
        clients = [threading.Thread(target=ask) for _ in range(200)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert {answer.status_code for answer in answers} <= {200, 429}
        assert all(a.json()["choices"][0]["message"] == alone for a in answers if a.status_code == 200)
        until(lambda: not engine.busy and not server.state.runner.events)
        assert threading.active_count() <= threads + (os.cpu_count() or 1) + 4  # asyncio's pool, which tokenises
        for connection in idle:
            connection.close()
