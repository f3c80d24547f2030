"""--plan: the memory, time and cost of a run, from ten real steps of it. Nothing of the run is saved.

    python trainer/train_full_sft.py --plan --batch_size 64 --price_per_hour 2.5
    python trainer/train_lora.py --config configs/lora.yaml --plan

`--batch_size` x `--accumulation_steps` is the batch to train with. How many of its rows fit into memory at once is
found by doubling. Memory grows linearly with the rows, so two sizes predict the next, and a size that would not fit is
not tried: on a CPU it would end the process. Then ten steps, a validation and a save are run and timed, and the times
are multiplied. Token caches stay, because the real run uses them too.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch

from common.console import UserError
from trainer.loop.backend import Backend
from trainer.loop.interrupts import memory_advice
from trainer.loop.periodic import count_saves
from trainer.run.logger import peak_memory
from trainer.run.meter import Meter, wait_for

STEPS = 10
WARM_UP = 3  # of these, not timed: the first ones compile, and fill the allocator
VALIDATION_STEPS = 8
USABLE_SHARE = 0.92  # of the free memory is planned with


def rehearsal(config):
    """The same options, writing into a temporary folder that is removed at the end of the program."""
    Path(config.save_dir).mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".plan-", dir=config.save_dir)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    silent = dict(use_wandb=False, use_swanlab=False, use_tensorboard=False)
    return dataclasses.replace(config, save_dir=folder, from_resume="0", **silent)


def plan(engine) -> None:
    """Prints the plan and ends the program, so that nothing that a stage does after training happens."""
    try:
        engine.model.train()
        rows = rows_that_fit(engine)
        while True:
            try:
                report(engine, rows, measure(engine, rows))
                break
            except torch.OutOfMemoryError as error:
                if rows == 1:
                    raise UserError(memory_advice(engine.config, engine.model, 1, engine.backend.world)) from error
                rows //= 2
                release(engine)
    finally:
        shutil.rmtree(engine.config.save_dir, ignore_errors=True)
    raise SystemExit(0)


# ---- memory ----


def rows_that_fit(engine) -> int:
    """The most rows at once that fit into free memory: --batch_size, or a divisor of it."""
    wished, device = engine.config.batch_size, engine.backend.device
    smallest = engine.backend.all_reduce_max(torch.tensor(-free_memory(device), device=device))
    free = -smallest.item()
    sizes = sorted({wished >> i for i in range(wished.bit_length()) if wished % (1 << i) == 0})
    if sizes[0] > 1:
        sizes = [1, *sizes]
    fits, peaks = sizes[0], {}
    sizes = [sizes[0], *sizes]  # the first one twice: its first step brings the optimiser's moments in
    # uncompiled: it needs a little more memory than compiled code, and no time for compiling
    with torch.compiler.set_stance("force_eager") if engine.compiled else nullcontext():
        for rows in sizes:
            if len(peaks) > 1:
                (a, before), (b, now) = list(peaks.items())[-2:]
                predicted = lambda rows: now + (now - before) / (b - a) * (rows - b)  # noqa: B023
                if predicted(wished) < free / 2:
                    return wished
                if predicted(rows) > USABLE_SHARE * free:
                    break
            try:
                peaks[rows] = trial(engine, rows)
            except torch.OutOfMemoryError:
                release(engine)
                break
            if peaks[rows] > USABLE_SHARE * free:
                break
            fits = rows
    return fits


def trial(engine, rows: int) -> float:
    """Peak memory in GiB of one training step with so many rows at once, of the rank that needs most: all ranks have to
    try the same rows."""
    forget_peak(engine.backend.device)
    set_rows(engine, rows)
    batches = engine.loader.batches(0)[:1]
    engine.train_step(batches)
    return most_memory(engine.backend)


def set_rows(engine, rows: int) -> None:
    """Computes so many rows at once, with the same examples in each step. `rows` divides --batch_size."""
    c = engine.config
    times = c.batch_size // rows * c.accumulation_steps
    engine.config = dataclasses.replace(c, batch_size=rows, accumulation_steps=times)
    engine.loader = engine._loader(engine.job.data.train, times, shuffle=True)
    if engine.compiled:
        engine.loader.limit_shapes()
    engine.val_loader = engine._loader(engine.job.data.val, 1, shuffle=False) if engine.val_loader else None
    engine.config = c


def release(engine) -> None:
    for parameter in engine.model.parameters():
        parameter.grad = None
    if engine.backend.device.type not in ("cpu", "mps"):  # torch cannot ask an Apple GPU for it (2.13)
        torch.accelerator.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Resets what peak_memory() measures, where the system can (not on macOS and Windows)."""
    if device.type not in ("cpu", "mps"):
        torch.accelerator.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and it would be counted
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, TypeError, AttributeError):
        pass


def most_memory(backend: Backend) -> float:
    """peak_memory() of the rank where it is highest."""
    return backend.all_reduce_max(torch.tensor(peak_memory(), device=backend.device)).item()


def free_memory(device: torch.device) -> float:
    """GiB that this process can use: what is free, and what it uses already. inf: unknown."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**30
    try:
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        free = [int(table["MemAvailable"].split()[0]) / 2**20]
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        own = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 2**20
    except (OSError, KeyError, StopIteration):  # not Linux: nothing is known before it is tried
        return float("inf")
    try:  # a container is given less than the machine has
        files = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        most, used = (int(file.read_text(encoding="ascii")) for file in files)
        free.append((most - used) / 2**30)
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return min(free) + own


# ---- time ----


def measure(engine, rows: int) -> dict[str, float]:
    """Seconds and GiB of real steps, of a validation and of a save, for `report`."""
    set_rows(engine, rows)
    forget_peak(engine.backend.device)
    backend, begin = engine.backend, time.perf_counter()
    meter = Meter(engine.model, engine.dtype, backend.device, engine.config.measure_peak)
    engine.logger.start(0, min(STEPS, engine.total))
    meter.go()
    seconds, computed, tokens = [], [], 0.0
    steps = min(STEPS, engine.total)
    for step, batches in engine.loader.prefetch(0, steps):
        start = time.perf_counter()
        engine._set_learning_rate()
        update = engine.train_step(batches)
        engine.step = step + 1
        wait_for(backend.device)
        meter.add(update.metrics, update.units, update.tokens, update.bad, update.batches)
        seconds.append(time.perf_counter() - start)
        computed.append(sum(len(batch.tokens) for batch in update.batches))
        tokens += update.tokens
    timed = slice(min(WARM_UP, steps - 1), None)
    row = statistics.median(s / n for s, n in zip(seconds[timed], computed[timed]))  # steps differ in rows
    asked = range(steps, min(engine.total, steps + 64))
    mean = statistics.mean([*computed, *(-(-len(engine.loader.rows(step)) // backend.world) for step in asked)])
    result = dict(step=row * mean, first=sum(seconds[: timed.start]), steps=steps, tokens=tokens / steps)
    engine.logger.log(engine.step, **meter.read(backend), grad_norm=float(update.norm))
    result["validation"] = validation_seconds(engine)
    start = time.perf_counter()
    engine.save()
    engine.writer.wait()
    result["save"] = time.perf_counter() - start
    engine.logger.close()
    result |= dict(memory=most_memory(backend), took=time.perf_counter() - begin)
    return result


def validation_seconds(engine) -> float:
    """Seconds of a whole validation, from its first steps."""
    if engine.val_loader is None:
        return 0.0
    steps = engine.val_loader.steps_per_epoch
    timed = engine.val_loader.steps_per_epoch = min(steps, VALIDATION_STEPS)
    start = time.perf_counter()
    engine.validate()
    return (time.perf_counter() - start) * steps / timed


def report(engine, rows: int, measured: dict[str, float]) -> None:
    """Prints the plan. measured: the result of `measure`."""
    c, say, total = engine.config, engine.logger.print, engine.total
    saves = count_saves(c, total, measured["step"])
    validations = -(-total // c.val_interval) if c.val_interval else saves
    steps = measured["first"] + measured["step"] * max(total - min(WARM_UP, measured["steps"] - 1), 0)
    aside = saves * measured["save"] + validations * measured["validation"]
    whole = engine.prepare_seconds + steps + aside
    clock = lambda seconds: str(timedelta(seconds=round(seconds)))
    speed = measured["tokens"] / measured["step"]
    free, times = free_memory(engine.backend.device), c.batch_size // rows * c.accumulation_steps
    of = f" of {free:.1f}" if free < float("inf") else ""
    say(f"plan, from {measured['steps']:.0f} real steps ({clock(measured['took'])}); nothing was saved:")
    fits = "all rows of a batch at once fit" if rows == c.batch_size else f"{rows} rows at once fit, not {c.batch_size}"
    say(f"  batch    {fits}: --batch_size {rows} --accumulation_steps {times}")
    say(f"  memory   {measured['memory']:.2f} GiB at most{of}")
    say(f"  speed    {measured['step']:.3g} s a step, {speed:,.0f} trained tokens/s")
    say(f"  time     {clock(whole)} for {total:,} steps ({clock(aside)} of it for validating and saving)")
    if c.price_per_hour:
        say(f"  cost     {whole / 3600 * c.price_per_hour:.2f} at {c.price_per_hour:g} an hour")
    else:
        say("  cost     with --price_per_hour")
    sys.stdout.flush()
