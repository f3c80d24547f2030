"""How a run ends early: by a signal, because another process died, or because memory ran out."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from contextlib import contextmanager

import torch

from common.console import UserError
from model.cost import batch_bytes, state_bytes
from model.transformer import CausalLM
from trainer.stage import StageConfig

DUPLICATE_SIGNAL_SECONDS = 5.0  # a launcher passes on a signal that its processes have received already within these
PATIENCE_SECONDS = 10.0  # after a signal; torchrun kills its processes 30 seconds after it has passed one on
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE)
NO_PEER = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|timed out|timeout|gloo|nccl|unbound buffer", re.IGNORECASE
)


class Signals(list[int]):
    """The numbers of the signals that were received."""

    since = math.inf  # when the first one came

    @property
    def overdue(self) -> bool:
        """Whether the first one came so long ago that no work may go on before everything is saved."""
        return time.monotonic() - self.since > PATIENCE_SECONDS


@contextmanager
def catch_signals():
    """Yields a list to which Ctrl-C and SIGTERM are appended, for the loop to check. A second signal ends the process.

    On Ctrl-C the terminal signals torchrun and its processes, and torchrun signals the processes again: that copy does
    not count as a second signal.
    """
    received, before = Signals(), {}
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def note(number, frame):
        if received and not (launched and time.monotonic() - received.since < DUPLICATE_SIGNAL_SECONDS):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.since = min(received.since, time.monotonic())
        received.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread (a test, a notebook): its owner handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def explained(config: StageConfig, model: CausalLM, world: int):
    """Turns errors of the machine (memory, network) into a UserError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or NO_MEMORY.search(text):
            raise UserError(memory_advice(config, model)) from error
        if world > 1 and (isinstance(error, torch.distributed.DistError) or NO_PEER.search(text)):
            first = text.strip().splitlines()[0]
            raise UserError(
                f"another process of this run has ended, or has not answered for --ddp_timeout {config.ddp_timeout:g} "
                f"seconds ({first[:120]}); this one ends too. The other one's own message says why; continue with "
                "--from_resume auto"
            ) from error
        raise


def memory_advice(config: StageConfig, model: CausalLM) -> str:
    """What needs how much memory, and the flags that train the same with less."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    fixed = state_bytes(trained, frozen, moments=1 if config.optimizer == "muon" else 2)
    rows, width = config.batch_size, (model.compute_dtype or torch.float32).itemsize
    moving = lambda rows: _gib(batch_bytes(model.config, rows, config.max_seq_len, width))
    advice, fewer = "", max((n for n in range(1, rows // 2 + 1) if rows % n == 0), default=0)
    if fewer:
        advice = f"--batch_size {fewer} --accumulation_steps {rows // fewer * config.accumulation_steps} trains the "
        advice += f"same with about {moving(fewer)} of the latter; or "
    return (
        f"out of memory: weights, gradients and moments take {_gib(fixed)}, what {rows} rows of {config.max_seq_len} "
        f"tokens leave for the backward pass about {moving(rows)} more (an estimate). {advice}lower --max_seq_len "
        f"(now {config.max_seq_len})" + ("" if model.compute_dtype == torch.bfloat16 else " or use --dtype bfloat16")
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
