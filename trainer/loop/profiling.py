"""--profile: where the time of a step goes, and a trace of a few steps.

    python trainer/train_full_sft.py --profile --max_steps 20
    python trainer/train_pretrain.py --profile --compile on --accumulation_steps 4

After some steps of warm-up the parts of a step are timed. On an accelerator the end of each part waits for the device,
so that a part has its own time only. The next steps run under torch's profiler, which slows them down: they are for the
trace and the operators, not for the times. The run goes on as without it.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common.files import atomic_file
from trainer.run.meter import wait_for

WARM_UP, TIMED, TRACED = 10, 5, 2  # steps, one after the other; fewer of each in a short run
LEAST = 3  # steps, one of each
OVERHEAD = "Python and launching"
KINDS = {  # what the names of operators and of a GPU's kernels stand for; the first that matches counts
    "exchange between processes": r"nccl|gloo|c10d|allreduce|all_reduce",
    "attention": r"attention|flash|fmha",
    "the optimiser": r"adam|optimizer|newton|multi_tensor",
    "softmax and loss": r"softmax|nll_loss|cross_entropy",
    "matrix products": r"::(mm|bmm|addmm|baddbmm|matmul|linear|_grouped_mm)$|mkldnn_linear|gemm|cutlass|nvjet|xmma",
    "fused by the compiler": r"compiled|triton|inductor|fused_",
    "embedding and indexing": r"embedding|index|gather|scatter|sort|topk|nonzero|masked",
    "copies and casts": r"copy|memcpy|memset|::(to|cat|clone|contiguous|fill_|zero_|zeros|empty|pin_memory|stack)",
    "sums and norms": r"norm|reduce|::(sum|mean|max|min|pow|rsqrt)",
    "element by element": r"elementwise|::(mul|add|sub|div|neg|silu|sigmoid|exp|cos|sin|where|clamp|reciprocal|lerp)",
}


def unprofiled(_part: str) -> None:
    """What a step says its parts to if nobody listens."""


class NoProfile:
    """The same methods, which do nothing."""

    part = staticmethod(unprofiled)

    def steps(self, batches: Iterable, _count: int) -> Iterable:
        return batches


class Profile(NoProfile):
    """Of one process.

    folder  where trace.json.gz is written
    say     prints the table
    """

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], Any]):
        self.folder, self.device, self.say = folder, device, say
        self.timed: list[dict[str, float]] = []  # of each timed step: seconds by part
        self.now: dict[str, float] | None = None  # of the step that is being timed
        self.name, self.since = "", 0.0
        self.profiler: Any = None  # while steps are traced
        self.range: Any = None  # the part, in the trace

    def part(self, name: str) -> None:
        """The step leaves the part it was in, and enters this one; "" is none."""
        if self.now is not None:
            wait_for(self.device)
            moment = time.perf_counter()
            if self.name:
                self.now[self.name] = self.now.get(self.name, 0.0) + moment - self.since
            self.name, self.since = name, moment
        if self.profiler:
            if self.range:
                self.range.__exit__(None, None, None)
            self.range = torch.profiler.record_function(name) if name else None
            if self.range:
                self.range.__enter__()

    def steps(self, batches: Iterable, count: int) -> Iterator:
        """The batches of `count` steps. Some of the steps are timed, and the ones after them traced."""
        if count < LEAST:
            self.say(f"--profile: needs at least {LEAST} steps, and {count} are left; going on without")
            yield from islice(batches, count)
            return
        warm_up, timed, traced = steps_of_each(count)
        inner = iter(batches)
        try:
            for number in range(count):
                if warm_up <= number < warm_up + timed:
                    self.now = {}
                if number == warm_up + timed:
                    self.profiler = start_profiler(self.device)
                self.part("waiting for the loader")
                batch = next(inner)
                self.part("counting, waiting for ranks")
                yield batch
                self.part("")
                if self.now:
                    self.timed.append(self.now)
                    self.now = None
                if number + 1 == warm_up + timed + traced:
                    self._report(traced)
        finally:  # also when the run stops in the middle
            if self.profiler:
                self.profiler.stop()

    def _report(self, traced: int) -> None:
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        path = self.folder / "trace.json.gz"
        with tempfile.TemporaryDirectory(dir=self.folder) as own, atomic_file(path) as temporary:
            profiler.export_chrome_trace(f"{own}/trace.json")
            with open(f"{own}/trace.json", "rb") as plain, gzip.open(temporary, "wb", compresslevel=5) as packed:
                shutil.copyfileobj(plain, packed)
        self.say(table(self.timed, operators(profiler, self.device), traced))
        self.say(f"trace: {path}; open it at https://ui.perfetto.dev or chrome://tracing")


def open_profile(wanted: bool, folder: Path, device: torch.device, say: Callable[[str], Any]) -> NoProfile:
    return Profile(folder, device, say) if wanted else NoProfile()


def steps_of_each(count: int) -> tuple[int, int, int]:
    """How many of the first of `count` steps, at least LEAST, warm up, are timed and are traced."""
    timed, traced = min(TIMED, count // 3), min(TRACED, count // 3)
    return min(WARM_UP, count - timed - traced), timed, traced


def start_profiler(device: torch.device) -> Any:
    known = {"cuda": torch.profiler.ProfilerActivity.CUDA, "xpu": torch.profiler.ProfilerActivity.XPU}
    activities = [torch.profiler.ProfilerActivity.CPU, *([known[device.type]] if device.type in known else [])]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13 prints where its profiler starts and stops
    profiler = torch.profiler.profile(activities=activities, acc_events=True)  # else torch 2.11 warns
    wait_for(device)
    profiler.start()
    return profiler


# ---- what is printed


def operators(profiler: Any, device: torch.device) -> dict[str, tuple[float, Counter]]:
    """Kind -> (seconds, {operator: seconds}): on a GPU of its kernels, on a CPU of the operators without those that
    they call."""
    found: dict[str, tuple[float, Counter]] = {}
    for event in profiler.key_averages():
        on_gpu = event.device_type != torch.autograd.DeviceType.CPU
        if on_gpu != (device.type in ("cuda", "xpu")) or event.is_user_annotation and on_gpu:
            continue
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kind = kind_of(event.key)
        total, names = found.get(kind, (0.0, Counter()))
        names[event.key.removeprefix("aten::")[:40]] += seconds
        found[kind] = total + seconds, names
    return found


def kind_of(operator: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, operator, re.IGNORECASE)), OVERHEAD)


def table(steps: list[dict[str, float]], kinds: dict[str, tuple[float, Counter]], traced: int) -> str:
    """The parts of the median step, and the kinds of operators by their time in the traced steps."""
    step = sorted(steps, key=lambda parts: sum(parts.values()))[len(steps) // 2]
    total = sum(step.values())
    lines = [f"where the time of a step goes: {1e3 * total:,.1f} ms, the median of {len(steps)}"]
    lines += [_line(name, seconds, total) for name, seconds in step.items()]
    computing = sum(seconds for seconds, _ in kinds.values()) or 1.0
    lines.append(f"and what it computes, by torch's profiler in {traced} further steps")
    for kind, (seconds, names) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        if seconds >= computing / 1000:
            heaviest = ", ".join(name for name, _ in names.most_common(3))
            lines.append(_line(kind, seconds / traced, computing / traced, "" if kind == OVERHEAD else heaviest))
    return "\n".join(lines)


def _line(name: str, seconds: float, total: float, remark: str = "") -> str:
    return f"  {name:<32}{1e3 * seconds:>10,.1f} ms{seconds / total:>7.1%}  {remark}".rstrip()
