"""Weights that are written again while they are served: the server says so, and reads them when it is told to."""

import gc
import json
import threading
import time
import weakref
from functools import partial
from types import SimpleNamespace

import httpx
import pytest

from model.checkpoint import save_weights
from serve.models import load_table
from tests.helpers.models import TOKENIZER, random_model, small_model
from tests.helpers.servers import CHAT, ENDLESS, HELLO, expected, running

MESSAGES = HELLO["messages"]


def trained(seed):
    return random_model(small_model().config, std=0.2, seed=seed).eval()


def write(folder, model):
    known = dict(path="tokenizer", hash=TOKENIZER.hash)
    return save_weights(folder / "full_sft_32.pth", model, tokenizer=known, lineage=[dict(stage="full_sft")])


@pytest.fixture
def setting(tmp_path):
    """A server of the weights in a folder."""
    old, new = trained(1), trained(2)
    assert expected(old, MESSAGES) != expected(new, MESSAGES)
    write(tmp_path, old)
    load = partial(load_table, ["full_sft"], [], (tmp_path,), rows=4, max_seq_len=200, device="cpu", dtype="float32")
    with running(*load()[0].values(), load=load) as server:
        yield SimpleNamespace(server=server, url=server.url, folder=tmp_path, old=old, new=new)


def says(server):
    return httpx.post(server.url + CHAT, json=HELLO | {"max_tokens": 12}).json()["choices"][0]["message"]["content"]


def changed(server):
    return [model["changed"] for model in httpx.get(server.url + "/v1/models").json()["data"]]


def reload(server):
    return httpx.post(server.url + "/reload", timeout=60)


def slow_down(engine, go):
    """10 tokens a second, until `go` is set."""
    step = engine.step

    def slow():
        go.wait(0.1)
        return step()

    engine.step = slow


def test_what_was_trained_again_is_loaded_and_running_answers_end_as_they_began(setting):
    text = lambda model, n=12: expected(model, MESSAGES, n)[2]
    assert says(setting) == text(setting.old) and changed(setting) == [False]
    engine = setting.server.state.table["full_sft"].engine
    assert reload(setting).json() == {"reloaded": False, "models": ["full_sft"]}
    assert setting.server.state.table["full_sft"].engine is engine, "nothing to load"

    go = threading.Event()
    slow_down(engine, go)
    body = HELLO | {"max_tokens": 60, "stream": True}
    with httpx.stream("POST", setting.url + CHAT, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        write(setting.folder, setting.new)
        assert changed(setting) == [True]
        assert reload(setting).json() == {"reloaded": True, "models": ["full_sft"]}
        assert says(setting) == text(setting.new) and changed(setting) == [False]
        assert engine.busy, "the old answer is still being written"
        go.set()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert said == text(setting.old, 60)
    left = weakref.ref(engine)
    del engine
    until = time.monotonic() + 10
    while left() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.02)
    assert left() is None, "the old weights leave the memory"


def test_a_file_that_cannot_be_read_changes_nothing(setting):
    file = setting.folder / "full_sft_32.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    answer = reload(setting)
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "reload_failed"
    assert "full_sft_32.pth" in answer.json()["error"]["message"]
    assert says(setting) == expected(setting.old, MESSAGES)[2] and changed(setting) == [True]
    file.unlink()
    assert changed(setting) == [False], "there is nothing to load instead"


def test_no_room_for_both_changes_nothing(setting, monkeypatch):
    """A card that holds the weights and their cache once, not twice: it was an internal error."""
    server = setting.server.state

    def full():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    write(setting.folder, setting.new)
    monkeypatch.setattr(server, "load", full)
    answer = reload(setting)
    assert answer.status_code == 409 and "start the server again" in answer.json()["error"]["message"]
    assert says(setting) == expected(setting.old, MESSAGES)[2]


def test_requests_and_reloads_at_the_same_time(setting):
    """Each answer is that of one of the two models, whole; none fails."""
    known = {expected(model, MESSAGES)[2] for model in (setting.old, setting.new)}
    found, end = [], threading.Event()

    def ask():
        while not end.is_set():
            found.append(says(setting))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for n in range(6):
        write(setting.folder, setting.new if n % 2 == 0 else setting.old)
        assert reload(setting).json()["reloaded"]
    end.set()
    for asker in askers:
        asker.join()
    assert set(found) == known


def test_a_server_that_was_started_before_the_first_training(tmp_path, browser):
    load = partial(load_table, ["full_sft"], [], (tmp_path,), rows=4, max_seq_len=200, device="cpu", dtype="float32")
    with running(load=load) as server:
        assert reload(server).status_code == 409
        assert httpx.post(server.url + CHAT, json=ENDLESS).status_code == 404
        browser.open(server.url + "/")
        browser.until("!!document.querySelector('#notice button')")
        write(tmp_path, trained(1))
        browser.click("#notice button")
        browser.until("document.querySelector('#model').value == 'full_sft'")
        assert browser.evaluate("document.querySelector('#notice').hidden")
        write(tmp_path, trained(2))
        browser.open(server.url + "/compare")
        browser.until("!!document.querySelector('#notice button')")
        assert "full_sft" in browser.text("#notice")
        browser.click("#notice button")
        browser.until("!document.querySelector('#notice button')")
        assert says(server) == expected(trained(2), MESSAGES)[2]
