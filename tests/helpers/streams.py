"""CUDA streams and events that only keep a log, for code that queues work on a card where there is none."""

import threading
from contextlib import contextmanager

import torch


class Streams:
    """log: what was done, in order, as (what, the stream or event that it was done to, name of the thread)."""

    def __init__(self, monkeypatch):
        self.log, self.main, self.threads = [], Stream(self), threading.local()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(self, device))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "stream", self.inside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "set_device", self.set_device)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.add("used on", stream))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.add("pin", self.current) or tensor)

    @property
    def current(self):
        return getattr(self.threads, "stream", self.main)

    @contextmanager
    def inside(self, stream):
        before, self.threads.stream = self.current, stream
        try:
            yield
        finally:
            self.threads.stream = before

    def set_device(self, device):
        if torch.device(device).index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        self.add("device", device)

    def add(self, what, where):
        self.log.append((what, where, threading.current_thread().name.split("_")[0]))


class Stream:
    def __init__(self, streams, device=None):
        self.streams, self.device = streams, torch.device("cuda", torch.device(device or "cuda").index or 0)

    def wait_event(self, event):
        self.streams.add("wait", event)


class Event:
    def __init__(self, streams):
        self.streams = streams

    def record(self, stream):
        self.streams.add("record", self)
        assert stream is self.streams.current
