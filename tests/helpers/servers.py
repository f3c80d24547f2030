"""A server on a free port in a thread of this process, and a model that says what it is told to say."""

import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import uvicorn
from torch import nn

from inference.engine import Engine
from inference.sampling import Sampling
from inference.slots import Reading
from serve.app import build_app
from serve.guard import PatientProtocol, Rules, guarded
from serve.models import Served
from serve.runs import Runs
from serve.server import Limits
from tests.helpers.models import TOKENIZER

GREEDY = Sampling(temperature=0)


def served(model, name="tiny", rows=4, capacity=512, base=None, before_step=lambda: None) -> Served:
    return Served(name, Engine(model, rows, capacity, before_step), TOKENIZER, base, created=1_700_000_000)


@contextmanager
def running(*models: Served, limits=Limits(), defaults=GREEDY, rules=Rules(), runs=Runs(())):  # noqa: B008
    """Yields `url` (without a path), `app` and `port`."""
    app = build_app({one.name: one for one in models}, limits, defaults, runs)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    settings = uvicorn.Config(guarded(app, rules), http=PatientProtocol, ws="none", log_level="error")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = listener.getsockname()[1]
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", app=app, port=port, state=app.state.server)
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
        position = int(cache.extend(tokens, None).reshape(-1)[-1])
        if isinstance(cache, Reading):
            self.start = position
        time.sleep(self.seconds)
        logits = torch.zeros(1, self.config.vocab_size)
        place = position - self.start
        logits[0, self.script[place] if place < len(self.script) else TOKENIZER.im_end] = 20.0
        return SimpleNamespace(logits=logits if selected is not None else logits[None])
