"""Capturing, on a device that is not the current one. What is captured is tested in test_engine.py."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from inference.drawn import Drawn
from inference.graphs import CaptureOnCUDA, FixedDecoding, _stream_for_captures
from inference.slots import Slots
from model.config import ModelConfig

SECOND = torch.device("cuda", 1)
WAITS = ("its stream waits",)
CLEARED = ("workspaces cleared",)


class Card:
    """torch.cuda that keeps a log of what it is asked for."""

    def __init__(self, monkeypatch):
        _stream_for_captures.cache_clear()
        self.log = []
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, self.inside(name))
        monkeypatch.setattr(torch.cuda, "graph", lambda _, stream, **__: self.inside("graph")(stream))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "memory of its own")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.make("another stream", device))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=0: self.make("its stream", device))
        clear = lambda: self.log.append(CLEARED)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)  # CPU builds have none
        monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda *of: self.log.append(of)))

    def make(self, name, device):
        wait = lambda other: self.log.append((f"{name} waits",))
        return SimpleNamespace(name=name, device=device, wait_stream=wait)

    def inside(self, name):
        @contextmanager
        def context(where):
            self.log.append((name, where))
            try:
                yield
            finally:
                self.log.append((f"{name} ends",))

        return context


def test_everything_is_captured_on_one_stream_of_the_models_device(monkeypatch):
    card = Card(monkeypatch)
    capture = CaptureOnCUDA(SECOND)
    for _ in range(2):
        card.log.clear()
        capture(lambda: card.log.append(("computed",)))
        own, computed = capture.stream, ("computed",)
        warm_up = [("another stream waits",), ("stream", own), computed, computed, ("stream ends",), WAITS]
        captured = [CLEARED, ("graph", own), computed, ("graph ends",), CLEARED]
        assert card.log[:7] == [("device", SECOND), *warm_up] and card.log[8:-2] == captured
        assert card.log[-2:] == [("stream ends",), ("device ends",)]
        assert own.device == SECOND


def test_the_next_engine_captures_on_the_same_stream(monkeypatch):
    """Each validation with --health_prompts has an engine of its own; torch has 32 streams."""
    Card(monkeypatch)
    assert CaptureOnCUDA(SECOND).stream is CaptureOnCUDA(SECOND).stream
    assert CaptureOnCUDA(SECOND).stream is not CaptureOnCUDA(torch.device("cuda", 2)).stream


def test_what_was_queued_before_there_was_no_memory_is_waited_for(monkeypatch):
    """It writes tokens and slots, as what is computed next without a graph does."""
    card = Card(monkeypatch)

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        CaptureOnCUDA(SECOND)(fails)
    assert card.log[-3:] == [("stream ends",), WAITS, ("device ends",)]


def test_a_failed_capture_leaves_the_thread_on_its_own_stream(monkeypatch):
    """torch does not: `graph` leaves its stream only after the capture has ended without an error (2.11, 2.13)."""
    card = Card(monkeypatch)

    class Graph:
        def __init__(self, _, stream, **__):
            self.stream = stream

        def __enter__(self):
            card.log.append(("stream", self.stream))

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    with pytest.raises(RuntimeError, match="previous error"):
        CaptureOnCUDA(SECOND)(lambda: None)
    *_, (_, outer), before, (_, captured), after, ended, _ = card.log
    assert (outer.name, captured.name, ended) == ("its stream", "another stream", ("stream ends",))
    assert before == after == CLEARED


def test_tokens_are_waited_for_on_their_own_device(monkeypatch):
    card = Card(monkeypatch)

    class There(torch.Tensor):
        is_cuda, device = True, SECOND

    monkeypatch.setattr("inference.drawn._to_host", lambda tensor: tensor)
    tokens = torch.zeros(2).as_subclass(There)
    Drawn([], tokens, tokens)
    ((stream,),) = card.log
    assert (stream.name, stream.device) == ("its stream", SECOND)


def test_a_row_that_only_fills_up_sees_a_key():
    """It is 40 long, and the row that counts 3: its window was behind all columns. Softmax of nothing may be NaN, which
    would be written into what its slot keeps."""
    shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    cache = FixedDecoding(Slots(ModelConfig(**shape), 2, 64, torch.float32), torch.tensor([[3], [40]]), columns=16)
    assert (cache.mask(4).tensor == 0).sum(-1).flatten().tolist() == [4, 4]
    assert (cache.mask(None).tensor == 0).sum(-1).flatten().tolist() == [4, 16]
