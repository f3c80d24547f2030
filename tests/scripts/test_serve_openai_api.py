"""The server as it is started: what is served under which name, who may reach it, and how it stops."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest
import torch

from common.console import UserError
from inference.engine import Request
from inference.generate import generate
from inference.sampling import Sampling
from model.adapter import save_adapter
from model.checkpoint import load_weights, save_weights
from model.lora import LoRASettings, activate, add_lora
from model.quant import quantized
from scripts import serve_openai_api
from serve.models import load_table, named
from tests.helpers.models import TOKENIZER as tokenizer
from tests.helpers.models import small_model
from tests.helpers.servers import running

KNOWN = dict(path="tokenizer", hash=tokenizer.hash)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A base, another model, and two adapters on the base."""
    folder = tmp_path_factory.mktemp("out")
    model = small_model(std=0.2).eval()
    save_weights(folder / "full_sft_32.pth", model, tokenizer=KNOWN, lineage=[])
    save_weights(folder / "reason_32.pth", small_model(std=0.1), tokenizer=KNOWN, lineage=[])
    base = dict(path=str(folder / "full_sft_32.pth"), hash=load_weights(folder / "full_sft_32.pth").hash)
    for seed, name in enumerate(("lora_one", "lora_two")):
        adapted, settings = small_model(std=0.2), LoRASettings(rank=2)
        add_lora(adapted, settings)
        torch.manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.shape[-1] == 2:  # B, which begins at 0
                torch.nn.init.normal_(parameter, std=0.3)
        save_adapter(folder / f"lora/{name}_32.pth", adapted, settings, base=base, tokenizer=KNOWN, lineage=[])
    return folder


def finish(engine, sequence):
    while not sequence.finish_reason:
        engine.step()
    return sequence.tokens


def test_names_and_places():
    entries = {
        "full_sft": ("full_sft", "full_sft"),
        "out/full_sft_512.pth": ("full_sft", "out/full_sft_512.pth"),
        "out/full_sft_640_moe.pth": ("full_sft", "out/full_sft_640_moe.pth"),
        "best=out/full_sft_512.pth": ("best", "out/full_sft_512.pth"),
        "models/Qwen3-0.6B": ("Qwen3-0.6B", "models/Qwen3-0.6B"),
        "/a=b/c.pth": ("c", "/a=b/c.pth"),
    }
    assert {entry: named(entry) for entry in entries} == entries


def test_adapters_share_their_base_and_do_not_mix(out):
    """Requests to a base and its two adapters at the same time: each gets what it alone would get."""
    table, remarks = load_table(
        ["full_sft", "other=reason"], ["lora_one", "second=lora_two"], (out,), rows=2, max_seq_len=128, dtype="float32"
    )
    assert list(table) == ["full_sft", "other", "lora_one", "second"] and len(remarks) == 4
    models = {name: one.engine.model for name, one in table.items()}
    assert models["full_sft"] is models["lora_one"] is models["second"] is not models["other"]
    assert [one.base for one in table.values()] == [None, None, "full_sft", "full_sft"]
    prompt = tokenizer.encode("hello, who are you?")
    request = Request(prompt, GREEDY, 10)
    sequences = {name: one.engine.submit(request) for name, one in table.items()}
    while any(one.engine.busy for one in table.values()):
        for one in table.values():
            one.engine.step()
    answers = {name: sequence.tokens for name, sequence in sequences.items()}
    assert len({tuple(tokens) for tokens in answers.values()}) == 4
    for name, active in (("full_sft", None), ("lora_one", "lora_one"), ("second", "second")):
        activate(models[name], active)
        assert generate(models[name], [prompt], GREEDY, max_new_tokens=10) == [answers[name]]


def test_an_adapter_alone_is_on_its_own_base(out):
    table, _ = load_table([], ["lora_one"], (out,), rows=1, max_seq_len=64)
    assert list(table) == ["lora_one"] and table["lora_one"].base is None
    with pytest.raises(ValueError, match="two models are called 'lora_one'"):
        load_table([], ["lora_one", str(out / "lora/lora_one_32.pth")], (out,), rows=1, max_seq_len=64)


def test_the_size_that_is_told_is_that_of_the_base(out):
    """The adapters' parameters were counted, too, in the base and in each adapter."""
    adapted, settings = small_model(std=0.2), LoRASettings(rank=64)
    size = f", {adapted.num_parameters() / 1e6:.1f}M parameters"
    add_lora(adapted, settings)
    assert f", {adapted.num_parameters() / 1e6:.1f}M parameters" != size
    base = dict(path=str(out / "full_sft_32.pth"), hash=load_weights(out / "full_sft_32.pth").hash)
    save_adapter(out / "lora/lora_large_32.pth", adapted, settings, base=base, tokenizer=KNOWN, lineage=[])
    _, remarks = load_table(["full_sft"], ["lora_large"], (out,), rows=1, max_seq_len=64)
    assert len(remarks) == 2 and all(remark.endswith(size) for remark in remarks)


@pytest.fixture(scope="module")
def crowd(out):
    """The base and its two adapters behind one server."""
    names = (["full_sft"], ["lora_one", "lora_two"], (out,))
    table, _ = load_table(*names, rows=3, max_seq_len=256, dtype="float32")
    with running(*table.values()) as server:
        server.table = table
        yield server


def test_adapters_under_load_answer_as_alone(crowd):
    """45 requests to a base and its adapters at once, streamed or not. Weights are switched between any two steps, and
    each greedy answer is the one that the model gives alone."""
    names = ("full_sft", "lora_one", "lora_two")
    questions = [f"question {n} " * (n % 5 + 1) for n in range(15)]

    async def ask() -> dict:
        async with httpx.AsyncClient(base_url=crowd.url, timeout=60) as client:

            async def one(name: str, question: str, stream: bool) -> str:
                body = {"model": name, "prompt": question, "max_tokens": 12, "stream": stream}
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200
                if not stream:
                    return answer.json()["choices"][0]["text"]
                events = [event.removeprefix("data: ") for event in answer.text.split("\n\n")[:-2]]
                return "".join(json.loads(event)["choices"][0]["text"] for event in events)

            asked = [(name, question) for question in questions for name in names]
            said = await asyncio.gather(*(one(*pair, stream=n % 2 == 0) for n, pair in enumerate(asked)))
            return dict(zip(asked, said))

    said = asyncio.run(ask())
    model = crowd.table["full_sft"].engine.model
    for name in names:
        crowd.table[name].engine.before_step()
        for question in questions:
            ids = [tokenizer.end_of_text, *tokenizer.encode(question)]
            (alone,) = generate(model, [ids], GREEDY, max_new_tokens=12, stop=tokenizer.stop_ids)
            assert said[name, question] == tokenizer.decode(alone, skip_control=True)
    assert len({said[name, questions[0]] for name in names}) == 3


def test_a_crowd_at_one_adapter_does_not_starve_another(crowd):
    """8 long answers of one name are written or wait; a short one of another name comes long before their end."""
    ends: list[str] = []
    endless = {str(token): -1000 for token in tokenizer.stop_ids}

    def ask(name: str, count: int) -> None:
        body = {"model": name, "prompt": "once", "max_tokens": count, "logit_bias": endless}
        assert httpx.post(crowd.url + "/v1/completions", json=body, timeout=60).status_code == 200
        ends.append(name)

    threads = [threading.Thread(target=ask, args=("lora_one", 100)) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not crowd.table["lora_one"].engine.waiting:
        pass
    ask("lora_two", 4)
    assert ends == ["lora_two"]
    for thread in threads:
        thread.join()


def test_weights_in_few_bits(out, tmp_path):
    """As in eval_model.py: asked for, or because the adapter was trained beside such."""
    table, remarks = load_table(["full_sft"], ["lora_one"], (out,), rows=1, max_seq_len=64, four=True)
    assert {layer.bits for layer in quantized(table["full_sft"].engine.model).values()} == {4}
    assert all("in 4 bits" in remark for remark in remarks[-2:])
    assert table["lora_one"].engine.model is table["full_sft"].engine.model
    for one in table.values():
        assert finish(one.engine, one.engine.submit(Request([5, 6], GREEDY, 3)))
    adapted, settings = small_model(std=0.2), LoRASettings(rank=2)
    add_lora(adapted, settings)
    base = dict(path=str(out / "full_sft_32.pth"), hash=load_weights(out / "full_sft_32.pth").hash, bits=8)
    path = save_adapter(tmp_path / "q_32.pth", adapted, settings, base=base, tokenizer=KNOWN, lineage=[])
    alone, _ = load_table([], [str(path)], (out,), rows=1, max_seq_len=64)
    assert {layer.bits for layer in quantized(alone["q"].engine.model).values()} == {8}
    beside, remarks = load_table(["full_sft"], [str(path)], (out,), rows=1, max_seq_len=64)
    assert not quantized(beside["q"].engine.model)
    assert any("trained beside weights in 8 bits" in remark and "--load_in_8bit" in remark for remark in remarks)


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit):
        serve_openai_api.main(list(argv))
    return capsys.readouterr().err


def test_other_machines_need_a_key(capsys, monkeypatch):
    monkeypatch.delenv("SPARROW_API_KEY", raising=False)
    assert "--host 0.0.0.0: other machines could use this server; give a key" in refused(capsys, "--host", "0.0.0.0")
    assert "--host ::" in refused(capsys, "--host", "::")
    assert "printable ASCII" in refused(capsys, "--api_key", "sch\u00f6n")
    config = serve_openai_api.ServeConfig(host="0.0.0.0", api_key="k")
    assert not config.problems() and serve_openai_api.hosts(config) == ()
    assert "localhost" in serve_openai_api.hosts(serve_openai_api.ServeConfig(allowed_hosts=("box.lan",)))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_computed_at_the_start_leaves_no_threads(root, tmp_path):
    """The server was twice as slow as eval_model.py: torch's helpers of the main thread, which had only loaded the
    model, were still there beside those of the engines' thread. Two threads an operation: one helper each."""
    script = f"""
import os, threading, time, torch
from scripts import serve_openai_api
from serve import models

def load_table(*args, **more):
    torch.ones(10_000_000).mul(2)
    found.append((threading.current_thread() is threading.main_thread(), count()))
    return {{}}, []

count = lambda: len(os.listdir("/proc/self/task"))
found, before, models.load_table = [], count(), load_table
import uvicorn
uvicorn.Server.run = lambda *_, **__: None
serve_openai_api.main(["--port", "0", "--save_dir", {str(tmp_path)!r}])
deadline = time.monotonic() + 60  # the thread ends just after its result is there
while count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(found, found[0][1] - before, count() - before)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("[(False, ") and done.stdout.endswith(" 2 0\n"), done.stdout + done.stderr


def test_help_does_not_wait_for_torch(root):
    start = "from scripts.serve_openai_api import main\ntry: main(['--help'])"
    script = f"import sys; {start}\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout.endswith("False\n") and "--drain_seconds" in done.stdout


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Starts the script up to where it would serve -> what it printed, and the pages it opened."""
    opened = []
    monkeypatch.setattr(serve_openai_api, "ROOT", tmp_path)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)

    def start(*argv):
        others = set(threading.enumerate())
        serve_openai_api.main([*argv, "--port", "0", "--device", "cpu", "--save_dir", str(tmp_path / "out")])
        for thread in set(threading.enumerate()) - others:
            if thread.daemon:
                thread.join(1)
        return capsys.readouterr().err, opened

    return start


def test_without_weights_the_runs_alone_are_shown(start, tmp_path):
    """Who trains a first model wants to watch it. Named weights, or no runs either: then it is a mistake."""
    with pytest.raises(UserError, match="no weights called 'full_sft'"):
        start()
    (tmp_path / "out/runs/pretrain-1").mkdir(parents=True)
    (tmp_path / "out/runs/pretrain-1/run.json").write_text("{}")
    said, _ = start()
    assert (
        "no weights called 'full_sft'" in said and "Load is pressed on the chat page, only the runs are shown" in said
    )
    assert re.search(
        r"serving no model at http://127.0.0.1:\d+/v1; the page is http://127.0.0.1:\d+/runs; Ctrl-C", said
    )
    with pytest.raises(UserError, match="no weights called 'mine'"):
        start("--weight", "mine")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there is always a display")
def test_a_browser_is_opened_only_where_there_is_a_display(start, tmp_path, monkeypatch):
    (tmp_path / "out/runs/pretrain-1").mkdir(parents=True)
    (tmp_path / "out/runs/pretrain-1/run.json").write_text("{}")
    said, opened = start("--web")
    assert not opened and re.search(r"no display here .* open http://127.0.0.1:\d+/runs in one", said)
    monkeypatch.setenv("DISPLAY", ":0")
    said, opened = start("--web", "--tools", "demo")  # as `eval_model.py --web --tools demo` hands it on
    assert len(opened) == 1 and opened[0].endswith("/runs") and "no display" not in said


def test_when_it_is_stopped_answers_are_finished(root, out, tmp_path):
    """MiniMind's flags; SIGTERM in mid-answer: the stream comes to its end, nothing new is taken, status 0. With --web
    a browser is told where the page is."""
    told, browser = tmp_path / "told", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > "{told}"\n')
    browser.chmod(0o755)
    flags = f"--weight full_sft --lora_weight None --load_from model --port 0 --device cpu --save_dir {out}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BROWSER": str(browser)}
    command = [sys.executable, "scripts/serve_openai_api.py", *flags.split(), "--temperature", "0", "--web"]
    read = dict(stderr=subprocess.PIPE, text=True, encoding="utf-8")
    process = subprocess.Popen(command, cwd=root, env=environment, **read)
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    try:
        lines = []
        while not lines or "serving" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        url = lines[-1].split(" at ")[1].split(";")[0]
        page = url.removesuffix("v1")
        assert f"the chat page is {page};" in lines[-1]
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 400}
        with httpx.stream("POST", url + "/chat/completions", json=body, timeout=60) as answer:
            stream = answer.iter_lines()
            first = next(stream)
            while not (told.exists() and told.read_text()):
                assert process.poll() is None
            assert told.read_text().strip() == page
            process.send_signal(signal.SIGTERM)
            rest = list(stream)
        assert first.startswith("data: ") and list(filter(None, rest))[-1] == "data: [DONE]"
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/models")
    finally:
        watchdog.cancel()
        process.kill()
        process.stderr.close()
