"""Writes files while training goes on: one after the other, in a thread of its own.

    writer = Writer(background=True)
    content = writer.keep(content)              # copies on the CPU; the next step changes the originals
    writer.write(partial(save_state, ..., content, ...))
    writer.check()                              # after every step: raises what has gone wrong meanwhile
    writer.wait()                               # at the end: until everything is on the disk

On a CPU the thread would take its time from training, and a copy may not fit into memory. So there nothing is copied,
and `write` returns when it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoint import write_plain


class Writer:
    def __init__(self, background: bool):
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="writer") if background else None
        self.pending: deque[Future] = deque()

    def keep(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `write` may read later, whatever becomes of the originals."""
        if self.pool is None:
            return tensors
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def write(self, work: Callable[[], Any]) -> None:
        """Does it after what was asked for before. No more than one other job waits, or copies would pile up."""
        if self.pool is None:
            work()
            return
        while len(self.pending) > 1:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(work))

    def write_plain(self, path: Path, values: dict, **tensors: dict[str, Tensor]) -> None:
        """As the function in model/checkpoint.py, of the tensors as they are now."""
        kept = {name: self.keep(content) for name, content in tensors.items()}
        self.write(partial(write_plain, path, values, **kept))

    def check(self) -> None:
        """Raises the error of a job that has failed."""
        while self.pending and self.pending[0].done():
            self.pending.popleft().result()

    def wait(self) -> None:
        """Returns when all is written, or raises the first error."""
        while self.pending:
            self.pending.popleft().result()
