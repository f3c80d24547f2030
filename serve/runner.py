"""The thread in which the engines compute, and the bridge from it to the server's event loop.

Python runs one thread at a time, so whatever the event loop does costs the engines time. To write and send a piece of
an answer takes it about MESSAGE_SECONDS. So the more answers have news, the longer they are collected: messages take
SHARE of the time, more only where news would wait longer than LONGEST. A first token and an end are told at once, and
the other answers' news is not told with them.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from inference.engine import Engine, Request, Sequence

Result = TypeVar("Result")
MESSAGE_SECONDS = 7e-5  # of the event loop; measured on a Xeon
SHARE = 0.02  # of the time, that messages may take
LONGEST = 0.1  # seconds that news may wait: a reader sees text that comes ten times a second flow


def apart(call: Callable[[], Result]) -> Result:
    """What `call` returns, from a thread that has then ended.

    Each thread that computes on a CPU has helpers of its own, which end with it. If there are more of them than cores,
    OpenMP sends them to sleep after each operation instead of letting them wait for the next one, and a token takes
    twice as long. So beside the engines' thread none that has computed may go on: models are loaded in one that ends.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # not a pool: Ctrl-C would wait for its end
    return future.result()


class Busy(Exception):
    """The queue is full."""


class Runner:
    """Steps the engines that have something to do, in turn. `submit` and `forget` belong to the event loop's thread.

    max_waiting  sequences of an engine that may wait for a place
    """

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self.engines: list[Engine] = []  # those with something to do: others are not kept alive by this
        self.lock = threading.Lock()  # for `engines`
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
        with self.lock:
            try:
                for request in requests:
                    sequences.append(engine.submit(request))
                    self.events[sequences[-1]] = event
            except ValueError:
                self.forget(sequences)
                raise
            finally:
                if engine not in self.engines:
                    self.engines.append(engine)
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
            with self.lock:
                self.engines = [engine for engine in self.engines if engine.busy]
                found = bool(self.engines)
            if not found:
                self._tell(news)
                self.work.wait()
                self.work.clear()
                continue
            moved = set(self._step())
            urgent = {s for s in moved if s.finish_reason or len(s.tokens) < 3}  # a GPU may have read the first two
            news = (news | moved) - urgent
            self._tell(urgent)
            if time.monotonic() - told > min(len(news) * MESSAGE_SECONDS / SHARE, LONGEST):
                self._tell(news)
                told = time.monotonic()

    def _step(self) -> list[Sequence]:
        """One step of each engine -> the sequences that got on. (A function, so that no variable keeps an engine.)"""
        everyone: list[Sequence] = []
        for engine in list(self.engines):
            try:
                moved = engine.step()
            except Exception as error:  # e.g. out of memory: these requests fail, the next ones are served
                moved = engine.fail(error)
            for error in {sequence.error for sequence in moved} - {None}:
                traceback.print_exception(error)
            everyone += moved
        return everyone

    def _tell(self, news: set[Sequence]) -> None:
        if news and self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the server stops
                self.loop.call_soon_threadsafe(self._wake, list(news))
        news.clear()

    def _wake(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if event := self.events.get(sequence):
                event.set()
