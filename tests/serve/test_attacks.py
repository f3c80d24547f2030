"""Clients that mean harm, one at a time: what each can take of memory, time and places is bounded."""

import asyncio
import json
import time
from contextlib import suppress
from types import SimpleNamespace

import httpx
import pytest

from inference.drawn import LogProb
from serve.choices import Choice, Choices, chat_logprobs
from serve.guard import PatientProtocol, Rules
from serve.server import Limits
from tests.helpers.models import TOKENIZER as tokenizer
from tests.helpers.models import small_model
from tests.helpers.servers import CHAT, ENDLESS, HELLO, Parrot, connect, head, running, served, whole
from tokenizer.answer import Answer, join


@pytest.fixture(scope="module")
def model():
    return small_model(std=0.2).eval()


# ---- one at a time


def test_who_does_not_read_is_broken_off_and_who_reads_slowly_is_not(monkeypatch):
    """An answer of 8 MB. The program had handed it over, so no limit of its own applied: who never read it kept it in
    memory for as long as the connection stood."""
    monkeypatch.setattr(PatientProtocol, "PATIENCE_SECONDS", 2)
    model = small_model(std=0.2, max_position_embeddings=500_000).eval()
    with running(served(model, capacity=500_000), rules=Rules(body_bytes=8 << 20)) as server:
        longest = max(range(tokenizer.vocab_size), key=lambda token: len(tokenizer.decode([token])))
        asked = whole({"tokens": [longest] * 490_000}, "/detokenize")
        with connect(server.port, small=True) as silent, connect(server.port) as slow:
            silent.sendall(asked)
            slow.sendall(asked)
            size, part, begin = 0, b"", time.monotonic()
            while b"}" not in part[-2:]:
                part = slow.recv(1 << 18)
                assert part, "the slow one was broken off"
                size += len(part)
                time.sleep(0.1)
            assert time.monotonic() - begin > 2.5, "longer than the patience"
            assert size > 5e6
            connections, end = server.uvicorn.server_state.connections, time.monotonic() + 30
            while any(one.transport.get_write_buffer_size() for one in list(connections)):
                assert time.monotonic() < end, "the silent one is still there"
                time.sleep(0.1)
            got = 0
            with suppress(ConnectionResetError):
                while part := silent.recv(1 << 20):
                    got += len(part)
            assert got < size - 1e6  # what the system had taken already
        assert httpx.post(server.url + CHAT, json=HELLO).status_code == 200


def test_a_queued_stream_whose_client_leaves_makes_room(model):
    """The headers of /v1/completions were sent with its first token. Until then nobody looked whether the client was
    still there, and its place in the queue stayed taken."""
    parrot = Parrot(model.config)
    parrot.script, parrot.seconds = tokenizer.encode("word " * 300), 0.02
    with running(served(parrot, rows=1, capacity=300), limits=Limits(max_waiting=1)) as server:
        engine = server.state.table["tiny"].engine
        with connect(server.port) as first:
            first.sendall(whole(ENDLESS | {"max_tokens": 250}))
            first.recv(100)
            with connect(server.port) as second:
                second.sendall(whole({"prompt": "x", "stream": True}, "/v1/completions"))
                assert b" 200 " in second.recv(1000) and len(engine.waiting) == 1
                assert httpx.post(server.url + CHAT, json=HELLO).status_code == 429
            end = time.monotonic() + 2
            while engine.waiting:
                assert time.monotonic() < end and engine.running, "it still waits"
                time.sleep(0.01)


@pytest.mark.parametrize("depth", [100, 400, 900, 3000])
def test_nested_objects_are_answered(model, depth):
    """Python's own limit is met while the request is read, checked or written into the prompt."""
    nested = '{"a":' * depth + "1" + "}" * depth
    hello = json.dumps(HELLO)[:-1]
    with running(served(model, capacity=8192)) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        for more in (f'"tools": [{nested}]', f'"x": {nested}', f'"tool_choice": {nested}', f'"tools": [{nested}]'):
            content = f"{hello}, {more}}}"
            answer = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400), answer.text
        assert client.post(CHAT, json=HELLO).status_code == 200


@pytest.mark.parametrize("turns", range(5))
def test_who_leaves_just_when_a_token_comes_is_not_followed_on(turns):
    """asyncio.wait_for of Python 3.11 took the token and forgot the cancellation: some answers went on to their end."""

    async def leave() -> None:
        event = asyncio.Event()
        choice = SimpleNamespace(finish_reason=None, seen=0, advance=list)
        choices = Choices(None, [choice], event, time.monotonic() + 60)

        async def follow() -> None:
            async for _ in choices.follow():
                pass

        task = asyncio.create_task(follow())
        await asyncio.sleep(0.01)
        event.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=1)
        assert task.cancelled()

    asyncio.run(leave())


def test_time_runs_out_also_for_who_gets_no_token():
    """In the queue, or where a step takes long: nothing wakes the answer but its own alarm."""
    choice = SimpleNamespace(finish_reason=None, seen=0, advance=list)
    choice.sequence = SimpleNamespace(cancel=lambda: setattr(choice, "finish_reason", "length"))

    async def follow() -> None:
        async for _ in Choices(None, [choice], asyncio.Event(), time.monotonic() + 0.05).follow():
            pass

    asyncio.run(asyncio.wait_for(follow(), 20))
    assert choice.finish_reason == "length"


def test_after_a_stop_word_nothing_is_written():
    """One choice of several may be over before the others: its place is given to who waits."""
    cancelled = []
    sequence = SimpleNamespace(tokens=tokenizer.encode("one two"), finish_reason=None)
    sequence.cancel = lambda: cancelled.append(True)
    choice = Choice(0, sequence, Answer(tokenizer, stop=["two"]), tokenizer)
    assert join(choice.advance())["content"] == "one " and choice.finish_reason == "stop" and cancelled
    sequence.tokens += tokenizer.encode(" three")
    assert choice.advance() == []


def test_log_probabilities_that_json_cannot_write():
    found = [(5, LogProb(float("-inf"), [(5, float("nan"))]))]
    (entry,) = chat_logprobs(tokenizer, found)["content"]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


def test_a_refused_body_gets_its_answer(model):
    """The connection was closed while the body still came, and so the client lost the answer that says why."""
    with running(served(model)) as server:
        for megabytes in (3, 6, 12):
            answer = httpx.post(server.url + CHAT, content=b"x" * (megabytes << 20), timeout=30)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        begin = time.monotonic()
        with connect(server.port) as endless:  # not for ever
            endless.sendall(head(CHAT, "Content-Length: 1000000000"))
            with suppress(ConnectionError):
                while time.monotonic() - begin < 20:
                    endless.sendall(b"x" * 1000)
                    time.sleep(0.01)
        assert time.monotonic() - begin < 10


def test_large_bodies_have_a_limit_in_all_and_small_ones_do_not(model):
    with running(served(model), rules=Rules(body_bytes=1 << 20, body_seconds=5)) as server:
        uploads = [connect(server.port) for _ in range(40)]
        for upload in uploads:
            upload.sendall(head(CHAT, f"Content-Length: {1 << 20}") + b" " * ((1 << 20) - 1))  # one byte is missing
        until = time.monotonic() + 4
        assert httpx.post(server.url + CHAT, json=HELLO).status_code == 200
        large = HELLO | {"user": "x" * 500_000}
        assert httpx.post(server.url + CHAT, json=large).status_code == 429
        refused = sum(b" 429 " in upload.recv(1000) for upload in uploads[24:])
        assert refused >= 10 and time.monotonic() < until
        for upload in uploads:
            upload.close()
        while httpx.post(server.url + CHAT, json=large).status_code != 200:
            assert time.monotonic() < until + 10
            time.sleep(0.1)


def test_what_is_not_http_is_refused_in_the_same_form(model):
    with running(served(model)) as server, connect(server.port) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01 this is TLS\r\n\r\n")
        answer = b""
        while part := connection.recv(2000):
            answer += part
        assert b" 400 " in answer and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_long_stop_words_cost_little():
    """16 words of 1,000 characters: at each token all beginnings of all words were tried, 3 ms on the event loop."""
    from tokenizer.answer import Scanner

    words = ["a" * n + "b" for n in range(984, 1000)]
    scanner, begin = Scanner(words), time.process_time()
    shown = "".join(text for _ in range(1000) for text, _ in scanner.push("aac"))
    shown += "".join(text for text, _ in scanner.push("", final=True))
    assert shown == "aac" * 1000 and time.process_time() - begin < 1


@pytest.mark.parametrize(
    "changes, path",
    [
        ({"logprobs": 20, "echo": True, "n": 16, "prompt": [[5] * 4000] * 4}, "/v1/completions"),
        ({"prompt": ["x"] * 30, "n": 3}, "/v1/completions"),
        ({"logprobs": True, "top_logprobs": 20, "n": 16, "max_tokens": 4000}, CHAT),
        ({"tokens": [5] * 5000}, "/detokenize"),
        ({"prompt": "long " * 300_000}, "/tokenize"),
        ({"tools": [{"function": {"name": "x", "description": "long " * 300_000}}]}, CHAT),
    ],
)
def test_what_would_take_gigabytes_or_minutes_is_refused(model, changes, path):
    with running(served(model, capacity=4096)) as server:
        body = (HELLO if path == CHAT else {}) | changes
        begin = time.monotonic()
        answer = httpx.post(server.url + path, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
        assert time.monotonic() - begin < 2
