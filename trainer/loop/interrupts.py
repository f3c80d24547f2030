"""How a run ends early: by a signal, because another process died, or because memory ran out."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from contextlib import contextmanager

import torch

from common.console import UserError, ran_out_of_memory
from model.cost import batch_bytes, state_bytes
from model.precision import has_bf16
from model.transformer import CausalLM
from trainer.stage import StageConfig

DUPLICATE_SIGNAL_SECONDS = 5.0  # a launcher passes on a signal that its processes have received already within these
PATIENCE_SECONDS = 10.0  # after a signal; torchrun kills its processes 30 seconds after it has passed one on
NO_PEER = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|timed out|timeout|gloo|nccl|unbound buffer", re.IGNORECASE
)

# NCCL's own failures, by the names of its errors; of the others a process that has ended is the usual cause
NCCL_FAILED = re.compile(r"nccl(UnhandledCudaError|InternalError|InvalidUsage|InvalidArgument)\b")
MAIN_MEMORY = re.compile(r"DefaultCPUAllocator|bad_alloc|cannot allocate memory|not enough memory", re.IGNORECASE)


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

    On Ctrl-C the terminal signals the launcher and its processes, and torchrun and DeepSpeed's launcher signal the
    processes again: that copy does not count as a second signal.
    """
    received, before = Signals(), {}
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ  # torchrun's, DeepSpeed's

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
        if ran_out_of_memory(error):
            on_card = next(model.parameters()).device.type != "cpu"
            if on_card and (isinstance(error, MemoryError) or MAIN_MEMORY.search(text)):
                raise UserError(
                    "out of memory: the machine's main memory is full, not the card's. A save needs room there for "
                    "weights and moments, and each process for data and torch itself: end what else runs on the "
                    "machine, or start fewer processes; continue with --from_resume auto"
                ) from error
            raise UserError(memory_advice(config, model, world=world)) from error
        if world > 1 and NCCL_FAILED.search(text):
            reason = text.rpartition("Last error:")[2].strip().splitlines()[0]
            raise UserError(
                f"NCCL, by which the cards exchange gradients, failed: {reason[:200]}. NCCL_DEBUG=INFO prints more; if "
                "another process has ended, its own message may say why; continue with --from_resume auto"
            ) from error
        if world > 1 and (isinstance(error, torch.distributed.DistError) or NO_PEER.search(text)):
            first = text.strip().splitlines()[0]
            raise UserError(
                f"another process of this run has ended, or has not answered for --ddp_timeout {config.ddp_timeout:g} "
                f"seconds ({first[:120]}); this one ends too. The other one's own message says why; continue with "
                "--from_resume auto"
            ) from error
        raise


def memory_advice(config: StageConfig, model: CausalLM, tried: int | None = None, world: int = 1) -> str:
    """What needs how much memory, and the flags that train the same with less. tried: rows at once that did not fit;
    None: --batch_size."""
    size = lambda t: getattr(t, "ds_numel", t.numel())  # of a weight that ZeRO-3 has divided, all of it
    trained = sum(size(p) for p in model.parameters() if p.requires_grad)
    frozen = sum(size(t) * t.itemsize for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    moments, stage = 1 if config.optimizer == "muon" else 2, config.zero_stage or 0
    offload = config.zero_offload if stage else "none"
    fixed = state_bytes(trained, frozen, moments, stage, world, offload != "none")
    rows, width = config.batch_size, (model.compute_dtype or torch.float32).itemsize
    moving = lambda rows: batch_bytes(model.config, rows, config.max_seq_len, width, model.recompute)
    room = _memory_of(next(model.parameters()).device) - fixed
    tried = tried or rows
    smaller = [n for n in range(1, tried // 2 + 1) if rows % n == 0]
    ways = []
    if smaller:  # of an estimate that uncompiled code exceeds by up to 30 % on a GPU
        fewer = max((n for n in smaller if 1.3 * moving(n) < room), default=1)
        ways.append(
            f"--batch_size {fewer} --accumulation_steps {rows // fewer * config.accumulation_steps} trains the same "
            f"with about {_gib(moving(fewer))} of the latter"
        )
    if not model.recompute:
        ways.append("add --activation_checkpointing")
    ways.append(f"lower --max_seq_len (now {config.max_seq_len})")
    if model.compute_dtype == torch.float32:
        ways.append("use --dtype bfloat16" if _knows_bf16(model) else "use --dtype float16")
    if room <= 0:
        divisible = world > 1 and stage < 3 and config.optimizer == "adamw"
        divided = "--zero_stage 3, which divides it among the processes, " if divisible else ""
        ways = [f"the former alone is more than the device has: {divided}--use_lora --load_in_4bit, or a smaller model"]
    return (
        f"out of memory: weights, gradients and moments take {_gib(fixed)}, what {_rows(tried)} of "
        f"{config.max_seq_len} tokens leave for the backward pass about {_gib(moving(tried))} more (an estimate): "
        + "; or ".join(ways)
    )


def _memory_of(device: torch.device) -> float:
    """Bytes of a GPU; of others it is not known what a process may have."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def _knows_bf16(model: CausalLM) -> bool:
    device = next(model.parameters()).device
    return device.type != "cuda" or has_bf16(device)


def _rows(count: int) -> str:
    return f"{count} rows" if count > 1 else "one row"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
