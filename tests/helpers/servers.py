"""A server on a free port in a thread of this process, and a model that says what it is told to say."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import uvicorn
from torch import nn

from common.files import ROOT
from inference.engine import Engine
from inference.generate import generate
from inference.sampling import Sampling
from inference.slots import Reading
from serve.app import build_app
from serve.guard import PatientProtocol, Rules, guarded
from serve.models import Served
from serve.runs import Runs
from serve.server import Limits
from tests.helpers.models import TOKENIZER
from tokenizer.chat import encode_chat

GREEDY = Sampling(temperature=0)
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
ENDLESS = HELLO | {"logit_bias": {str(token): -1000 for token in TOKENIZER.stop_ids}, "stream": True}


def served(
    model, name="tiny", rows=4, capacity=512, base=None, before_step=lambda: None, tokenizer=TOKENIZER
) -> Served:
    return Served(name, Engine(model, rows, capacity, before_step), tokenizer, base, created=1_700_000_000)


@contextmanager
def running(*models: Served, limits=Limits(), defaults=GREEDY, rules=Rules(), runs=Runs(()), load=None):  # noqa: B008
    """Yields `url` (without a path), `port`, `app`, its `state`, and the `uvicorn` server."""
    app = build_app({one.name: one for one in models}, limits, defaults, runs, load)
    del models  # those that are loaded anew leave the memory
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    settings = uvicorn.Config(guarded(app, rules), http=PatientProtocol, ws="none", log_level="error")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = listener.getsockname()[1]
    try:
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}", app=app, port=port, state=app.state.server, uvicorn=server
        )
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


class Parrot(nn.Module):
    """Stands in for a model in an engine with one row: answers every prompt with `script`. `seconds` a step."""

    compute_dtype = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, 2)
        self.script: list[int] = []
        self.start, self.seconds = 0, 0.0

    def forward(self, tokens, *, selected=None, cache=None):
        position = int(cache.extend(tokens).reshape(-1)[-1])
        if isinstance(cache, Reading):
            self.start = position
        time.sleep(self.seconds)
        logits = torch.zeros(1, self.config.vocab_size)
        place = position - self.start
        logits[0, self.script[place] if place < len(self.script) else TOKENIZER.im_end] = 20.0
        return SimpleNamespace(logits=logits.expand(len(selected), -1) if selected is not None else logits[None])


def say(parrot, *pieces):
    """What it answers from now on; a piece is text or the name of a control token."""
    parrot.script = []
    for piece in pieces:
        parrot.script += [TOKENIZER.control[piece]] if piece in TOKENIZER.control else TOKENIZER.encode(piece)


def expected(model, messages, n=12):
    """(ids of the prompt, ids of the greedy reply of at most n tokens, its text)"""
    ids = encode_chat(TOKENIZER, messages, add_generation_prompt=True).ids
    (reply,) = generate(model, [ids], GREEDY, max_new_tokens=n, stop=TOKENIZER.stop_ids)
    return ids, reply, TOKENIZER.decode(reply, skip_control=True)


@contextmanager
def started(*flags: str):
    """scripts/serve_openai_api.py in a process of its own. Yields `url` (without a path), `port`, `process`, and
    `resident()`: its memory in MB (Linux)."""
    command = [sys.executable, str(ROOT / "scripts/serve_openai_api.py"), "--port", "0", "--device", "cpu", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    few = "import os, resource, sys; limit = resource.RLIMIT_NOFILE;"  # files, as on most systems
    few += "resource.setrlimit(limit, (1024, resource.getrlimit(limit)[1])); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", few, *command]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    watchdog = threading.Timer(600, process.kill)
    watchdog.start()
    assert process.stderr is not None
    try:
        lines = [""]
        while " at http" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        url = lines[-1].split(" at ")[1].split("/v1;")[0]
        threading.Thread(target=process.stderr.read, daemon=True).start()  # what it says must not fill the pipe
        statm = Path(f"/proc/{process.pid}/statm")
        resident = lambda: int(statm.read_text().split()[1]) * 4096 / 1e6
        yield SimpleNamespace(url=url, port=int(url.rpartition(":")[2]), process=process, resident=resident)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


# ---- clients that speak HTTP themselves


def head(path: str, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(body: dict, path: str = CHAT) -> bytes:
    content = json.dumps(body).encode()
    return head(path, f"Content-Length: {len(content)}") + content


def connect(port: int, small: bool = False) -> socket.socket:
    """small: the system keeps as little as possible of what is not read."""
    connection = socket.socket()
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    return connection
