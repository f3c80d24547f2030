"""Who may ask, how much, and for how long; and that a client who leaves, lingers or lies costs the others nothing."""

import json
import socket
import threading
import time

import httpx
import pytest

from inference.engine import Engine
from serve.guard import PatientProtocol, Rules, name_of
from serve.server import Limits
from tests.helpers.models import TOKENIZER as tokenizer
from tests.helpers.models import small_model
from tests.helpers.servers import Parrot, running, served

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model():
    return small_model(std=0.2).eval()


@pytest.fixture(scope="module")
def server(model):
    with running(served(model, capacity=1024), rules=Rules(body_bytes=20_000, body_seconds=1.0)) as server:
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


def test_small_messages_are_sent_at_once(server):
    """Each answer took 40 ms: the system kept its body until the client had confirmed the head."""
    with httpx.Client() as client:
        assert client.get(server.url + "/health").status_code == 200
        sockets = [p.transport.get_extra_info("socket") for p in server.uvicorn.server_state.connections]
        assert sockets and all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)


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
    client = httpx.Client(timeout=30)  # one for all: each takes a while to make, and they must come in time
    ask = lambda: client.post(slow.url + CHAT, json=HELLO | {"max_tokens": 60})
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
    client.close()


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


def test_no_place_of_a_request_makes_a_control_token(server, monkeypatch):
    """What the model reads of requests with a tag in every place has the control tokens of harmless ones."""
    read: list[list[int]] = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, request: read.append(request.prompt) or submit(self, request))

    def bodies(word: str):
        function = {"name": word, "description": f"a {word}", "parameters": {word: {"enum": [word, f"x{word}"]}}}
        call = {"id": word, "type": "function", "function": {"name": word, "arguments": json.dumps({word: [word]})}}
        roles = [
            {"role": "system", "content": f"{word} be good {word}", "name": word},
            {"role": "developer", "content": word},
            {"role": "user", "content": [{"type": "text", "text": word}, {"type": "text", "text": f"\n{word}x"}]},
            {"role": "assistant", "content": f"a {word}", "reasoning": f"b {word}\n", "tool_calls": [call]},
            {"role": "tool", "content": f"{word}\n{word}", "tool_call_id": word, "name": word},
            {"role": "assistant", "content": None, "function_call": {"name": word, "arguments": "{}"}},
            {"role": "function", "content": word, "name": word},
            {"role": "user", "content": f"{word[:2]}{word[2:]}", "name": word, word: word},
        ]
        everywhere = {"model": "tiny", "messages": roles, "stop": [word], "user": word, "metadata": {word: word}}
        everywhere |= {"max_tokens": 1, "chat_template_kwargs": {word: word}, word: word}
        tools = {"tools": [{"type": "function", "function": function}]}
        for more in (
            {},
            tools,
            tools | {"tool_choice": {"type": "function", "function": {"name": word}}},
            {"response_format": {"type": word}},
            {"model": word},
            {"messages": [{"role": word, "content": word}]},
        ):
            yield CHAT, everywhere | more
        for prompt in (word, [word, f"x{word}"]):
            yield "/v1/completions", {"prompt": prompt, "max_tokens": 1, "stop": word, "user": word}
        yield "/v1/completions", {"prompt": "x", "suffix": word}

    def control_ids(word: str) -> tuple[list[int], list[list[int]]]:
        read.clear()
        with httpx.Client(base_url=server.url) as client:
            statuses = [client.post(path, json=body).status_code for path, body in bodies(word)]
        return statuses, [[token for token in ids if token in set(tokenizer.control.values())] for ids in read]

    statuses, harmless = control_ids("harmless")
    assert len(harmless) == 6  # three chats and three texts, two of them in one request; the others are refused
    assert statuses == [200, 200, 200, 400, 404, 400, 200, 200, 400]
    for tag in tokenizer.control:
        assert control_ids(tag) == (statuses, harmless), tag
