"""The thread in which the engines compute, and the bridge from it to the server's event loop.

Python runs one thread at a time, so each message between the two costs the engines time. What happened is therefore
told at most every TELL_SECONDS, for all sequences together; a first token and an end are told at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress

from inference.engine import Engine, Request, Sequence

TELL_SECONDS = 0.02


class Busy(Exception):
    """The queue is full."""


class Runner:
    """Steps all engines in turn. `submit` and `forget` belong to the event loop's thread.

    max_waiting  sequences of an engine that may wait for a place
    """

    def __init__(self, engines: Iterable[Engine], max_waiting: int):
        self.engines, self.max_waiting = list(engines), max_waiting
        self.events: dict[Sequence, asyncio.Event] = {}
        self.work, self.stopping = threading.Event(), False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="engines", daemon=True)

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        self.stopping = True
        self.work.set()
        self.thread.join()

    def submit(self, engine: Engine, requests: list[Request]) -> tuple[list[Sequence], asyncio.Event]:
        """-> the sequences, and the event that is set whenever one of them has got on. Busy if the queue is full; an
        engine with nothing to do takes a request of any number of choices."""
        free = engine.rows - len(engine.running) - len(engine.reading)
        if engine.busy and len(engine.waiting) + len(requests) - free > self.max_waiting:
            raise Busy
        event, sequences = asyncio.Event(), []
        try:
            for request in requests:
                sequences.append(engine.submit(request))
                self.events[sequences[-1]] = event
        except ValueError:
            self.forget(sequences)
            raise
        self.work.set()
        return sequences, event

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Nobody waits for these any more. What is not finished gets no further token."""
        for sequence in sequences:
            sequence.cancel()
            self.events.pop(sequence, None)

    def _run(self) -> None:
        news: set[Sequence] = set()
        told = 0.0
        while not self.stopping:
            busy = [engine for engine in self.engines if engine.busy]
            if not busy:
                self._tell(news)
                self.work.wait()
                self.work.clear()
                continue
            urgent = False
            for engine in busy:
                try:
                    moved = engine.step()
                except Exception as error:  # e.g. out of memory: these requests fail, the next ones are served
                    moved = engine.fail(error)
                for error in {sequence.error for sequence in moved} - {None}:
                    traceback.print_exception(error)
                news.update(moved)
                urgent = urgent or any(s.finish_reason or len(s.tokens) == 1 for s in moved)
            if urgent or time.monotonic() - told > TELL_SECONDS:
                self._tell(news)
                told = time.monotonic()

    def _tell(self, news: set[Sequence]) -> None:
        if news and self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the server stops
                self.loop.call_soon_threadsafe(self._wake, list(news))
        news.clear()

    def _wake(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if event := self.events.get(sequence):
                event.set()
