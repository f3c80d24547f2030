"""Prints the progress of a run, and always writes metrics.jsonl, run.json and loss.png.

    logger = RunLogger.create(Path("out/runs/pretrain-1"), config, enabled=rank == 0)
    logger.start(step=0, total=1000)                                # a run resumed after step 400: start(400, 1000)
    logger.log(10, loss=3.2, lr=5e-4, grad_norm=0.9, tokens=81920, tokens_per_second=5300.0)
    logger.log(20, loss=3.0, lr=5e-4, val_loss=3.1, val_bpb=1.4)    # any named number is written and printed
    logger.draw()                                                   # loss.png, at every save
    logger.close({"loss": 2.9})                                     # prints a summary

--use_wandb, --use_swanlab and --use_tensorboard send the same numbers there. No failure of logging stops the training:
the part that failed is named once and switched off.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from common.console import printable
from common.files import ROOT, atomic_file
from common.options import Options
from common.picture import readable
from trainer.run.reference import Curve, Reference

TRACKERS = ("wandb", "swanlab", "tensorboard")
BAND = "#f6d88f"  # colour in loss.png
# How known numbers are printed, in this order ("": not at all). Others follow with four significant digits.
FORMATS = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.0%}",
    "memory_gib": "{:.1f} GiB",
    "health_ended": "ended {:.0%}",
    "health_rep_4": "rep-4 {:.0%}",
    "health_wrong_language": "wrong language {:.0%}",
    **dict.fromkeys(("health_empty", "health_distinct_1", "health_distinct_2", "health_tags_closed"), ""),
    **dict.fromkeys(("health_length_ratio", "health_no_room"), ""),
    "tokens": "",
    "seconds": "",
}


class NoLogger:
    """The same methods, which do nothing: for all ranks but the first."""

    reference: Reference | None = None

    def print(self, text: str) -> None: ...
    def start(self, step: int, total: int) -> None: ...
    def advance(self, step: int) -> None: ...
    def log(self, step: int, **numbers: float) -> None: ...
    def draw(self) -> None: ...
    def close(self, summary: dict[str, Any] | None = None) -> None: ...


class RunLogger(NoLogger):
    @staticmethod
    def create(
        run_dir: Path | str, config: Options, enabled: bool = True, reference: Reference | None = None, **entries: Any
    ) -> NoLogger:
        """reference: what the run is compared with. entries: more for run.json and the trackers, such as the number of
        parameters."""
        return RunLogger(Path(run_dir), config, reference, entries) if enabled else NoLogger()

    def __init__(self, run_dir: Path, config: Options, reference: Reference | None, entries: dict[str, Any]):
        self.run_dir, self.config, self.entries = run_dir, config, entries
        self.reference = reference
        self.metrics = run_dir / "metrics.jsonl"
        # parts by name: what takes (step, numbers), what closes it, and which have failed
        self.sinks: dict[str, Callable[[int, dict], Any]] = {}
        self.closers: dict[str, Callable[[], Any]] = {}
        self.failed: set[str] = set()
        self.bar: Any = None
        self.run_info: dict[str, Any] = {}
        self.began = time.monotonic()
        self.earlier_seconds = 0.0  # of a resumed run, what its earlier processes took
        self._try("run.json", self._write_run_info)

    def print(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        text = printable(text)
        try:
            self.bar.write(text) if self.bar is not None else print(text, flush=True)
        except (OSError, ValueError):  # the terminal or pipe was closed; the run goes on without it
            pass

    def start(self, step: int, total: int) -> None:
        """Training continues after `step`. What a killed process logged for later steps is removed."""
        self.total, self.began, self.earlier_seconds = total, time.monotonic(), 0.0
        self.recent = deque([(self.began, step)], maxlen=50)  # (time, step) of this process only, for the ETA
        self.run_info["total_steps"] = total  # for who watches the run
        self._try("run.json", self._write_run_info)
        self._try("metrics.jsonl", self._open_metrics, step)
        for name in TRACKERS:
            if getattr(self.config, f"use_{name}", False):
                self._try(name, getattr(self, f"_open_{name}"), step)
        if sys.stderr.isatty():
            self._try("progress bar", self._open_bar, step)

    def advance(self, step: int) -> None:
        """Moves the bar, if there is one, also after steps that are not logged."""
        if self.bar is not None:
            self._try("progress bar", self.bar.update, step - self.bar.n)

    def log(self, step: int, **numbers: float) -> None:
        now = time.monotonic()
        self.recent.append((now, step))
        numbers["seconds"] = round(self.seconds(), 2)
        if memory := peak_memory():
            numbers["memory_gib"] = round(memory, 3)
        for name, sink in self.sinks.items():
            self._try(name, sink, step, numbers)

        line = self._line(step, numbers)
        if self.bar is not None:
            self._try("progress bar", self.bar.set_description_str, line)  # draws, so it can fail
            self.advance(step)
        if self.bar is None or "val_loss" in numbers:
            self.print(f"step {step:,}/{self.total:,}  {line}")
        if self.reference and (warning := self._compare(numbers)):
            self.print(warning)

    def _compare(self, numbers: dict[str, Any]) -> str:
        """With the reference curve -> what there is to say."""
        assert self.reference
        return self.reference.add(numbers["tokens"], numbers["loss"]) if {"tokens", "loss"} <= numbers.keys() else ""

    def seconds(self) -> float:
        """What the run has taken so far, all its processes together."""
        return self.earlier_seconds + time.monotonic() - self.began

    def draw(self) -> None:
        if self.metrics.exists():
            curve = self.reference and self.reference.curve
            self._try("loss.png", draw_losses, self.metrics, self.run_dir / "loss.png", curve)
            gc.collect(1)  # figures are cyclic garbage: without this, memory grows by a megabyte at each save

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Ends logging; may be called twice, and without `start`. summary: results of a run that was completed."""
        self.draw()
        if summary is not None:
            summary = {**summary, "seconds": round(self.seconds(), 1), "memory_gib": round(peak_memory(), 3)}
            if price := getattr(self.config, "price_per_hour", 0.0):
                summary["cost"] = round(price * summary["seconds"] / 3600, 4)
            self.run_info["summary"] = summary
            self._try("run.json", self._write_run_info)
        for name, closer in self.closers.items():  # wandb prints lines of its own here
            self._try(name, closer)
        self.closers, self.sinks, self.bar = {}, {}, None
        if summary is not None:
            self.print(closing_line(summary))

    # ---- files and trackers ----

    def _try(self, name: str, action: Callable, *arguments: Any) -> None:
        """Does it, unless this part has failed before. A failure is printed once and switches the part off."""
        if name in self.failed:
            return
        try:
            action(*arguments)
        except Exception as error:  # whatever it is, training goes on
            self.failed.add(name)
            hint = f" (pip install {error.name})" if isinstance(error, ModuleNotFoundError) else ""
            self.print(f"warning: {name} is off for the rest of this run: {type(error).__name__}: {error}{hint}")

    def _write_run_info(self) -> None:
        path = self.run_dir / "run.json"
        if not self.run_info:
            self.run_info = describe_run(self.config)
            if path.exists():  # a resumed run keeps the entries of its earlier processes
                earlier = json.loads(path.read_text(encoding="utf-8"))
                self.run_info["earlier"] = [*earlier.pop("earlier", []), earlier]
            self.run_info |= self.entries
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.run_info, indent=2, ensure_ascii=False), encoding="utf-8")

    def _open_metrics(self, step: int) -> None:
        import jsonlines

        if self.metrics.exists():
            kept = [row for row in read_metrics(self.metrics) if row["step"] <= step]
            self.earlier_seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
            for row in kept if self.reference else ():  # what was said is not said again
                self._compare(row)
            with atomic_file(self.metrics) as temporary, jsonlines.open(temporary, "w") as file:
                file.write_all(kept)
        writer = jsonlines.open(self.metrics, "a", flush=True)
        finite = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x  # JSON has no NaN
        self.sinks["metrics.jsonl"] = lambda step, numbers: writer.write(
            {"step": step, **{name: finite(value) for name, value in numbers.items()}}
        )
        self.closers["metrics.jsonl"] = writer.close

    def _settings(self) -> dict[str, Any]:
        return self.config.as_dict() | self.entries

    def _init_arguments(self) -> dict[str, Any]:
        """What wandb.init and swanlab.init have in common. The id makes a resumed run continue the same record."""
        return dict(
            project=self.config.wandb_project,
            name=self.config.wandb_run_name or self.run_dir.name,
            id=self.run_dir.name,
            resume="allow",
            config=self._settings(),
        )

    def _open_wandb(self, _step: int) -> None:
        import wandb

        self._add_tracker("wandb", wandb.init(dir=str(self.run_dir), **self._init_arguments()))

    def _open_swanlab(self, _step: int) -> None:
        import swanlab

        folder = self.run_dir / "swanlab"
        folder.mkdir(exist_ok=True)
        self._add_tracker("swanlab", swanlab.init(log_dir=str(folder), **self._init_arguments()))

    def _add_tracker(self, name: str, run: Any) -> None:
        self.sinks[name] = lambda step, numbers: run.log(numbers, step=step)
        self.closers[name] = run.finish

    def _open_tensorboard(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.run_dir / "tensorboard"), flush_secs=10, purge_step=step + 1)
        writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in self._settings().items()))

        def write(step: int, numbers: dict) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        self.sinks["tensorboard"] = write
        self.closers["tensorboard"] = writer.close

    def _open_bar(self, step: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.total, initial=step, dynamic_ncols=True, bar_format="{n_fmt}/{total_fmt} |{bar:20}| {desc}"
        )
        self.closers["progress bar"] = self.bar.close

    def _line(self, step: int, numbers: dict[str, float]) -> str:
        parts = [form.format(numbers[name]) for name, form in FORMATS.items() if form and name in numbers]
        parts += [f"{name} {value:.4g}" for name, value in numbers.items() if name not in FORMATS]
        (then, first), (now, last) = self.recent[0], self.recent[-1]
        if last > first and step < self.total:
            parts.append(f"ETA {timedelta(seconds=round((now - then) / (last - first) * (self.total - step)))}")
        return "  ".join(parts)


def git_commit() -> str:
    """The commit, with -dirty if files differ from it; empty without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:  # what git says to stderr may be in any language and encoding, and is not read
        found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10)
        return found.stdout.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def describe_run(config: Options) -> dict[str, Any]:
    """What is needed to know later how these numbers came about."""
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    return {
        "command": shlex.join(sys.orig_argv),
        "directory": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": config.as_dict(),
        "versions": {"sparrow": git_commit(), "python": platform.python_version(), **versions},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "ranks": os.environ.get("WORLD_SIZE", "1")},
    }


def closing_line(summary: dict[str, Any]) -> str:
    """Time, steps, losses, memory and cost of a completed run, in one line."""
    parts = [f"done in {timedelta(seconds=round(summary['seconds']))}"]
    parts += [
        f"{summary[name]:,} {words}"
        for name, words in (("steps", "steps"), ("tokens", "trained tokens"))
        if name in summary
    ]
    parts += [f"{name} {summary[name]:.4f}" for name in summary if "loss" in name or "bpb" in name]
    if summary["memory_gib"]:
        parts.append(f"{summary['memory_gib']:.2f} GiB at most")
    if "cost" in summary:
        parts.append(f"cost {summary['cost']:.2f}")
    return ", ".join(parts) + (f": {summary['weights']}" if "weights" in summary else "")


def peak_memory() -> float:
    """Most GiB that this process has used, of the GPU if there is one, else of main memory; 0 if it is not known."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()):
        return used / 2**30
    try:  # before getrusage, which includes what our parent used before it started us
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run, without a last line that was cut off when the run was killed."""
    import jsonlines

    with jsonlines.open(path) as file:
        return list(file.iter(type=dict, skip_invalid=True))


def beside_curve(rows: list[dict[str, Any]], curve: Curve) -> list[tuple[float, ...]]:
    """[(step, loss, lower edge, median, upper edge)] of what was logged, as far as the curve goes."""
    logged = [row for row in rows if row.get("loss") is not None and 0 < row.get("tokens", 0) <= curve.tokens[-1]]
    begins = [0, *(row["tokens"] for row in logged)]
    return [(row["step"], row["loss"], *curve.band(begin, row["tokens"])) for begin, row in zip(begins, logged)]


def draw_band(axes: Any, under: Any, columns: Any, curve: Curve) -> None:
    """Into the losses, and below them in percent of the median: beside the fall of the loss it is too narrow to see.

    columns  those of `beside_curve`
    """
    steps, losses, low, median, high = columns
    axes.fill_between(steps, low, high, color=BAND, label=f"band of {curve.describe()}")
    losses, low, high = (100 * (values / median - 1) for values in (losses, low, high))
    under.fill_between(steps, low, high, color=BAND)
    under.plot(steps, losses, color="#1f5f99", linewidth=1.8)
    limit = 3 * max(high.max(), -low.min())  # a run that is farther away leaves the picture
    under.set(xlabel="optimiser step, as far as the curve", ylabel="% off the median", ylim=(-limit, limit))


@readable()
def draw_losses(metrics: Path, picture: Path, curve: Curve | None = None) -> None:
    """metrics.jsonl -> loss.png: training loss, its moving average, validation loss, and the band of a reference."""
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    rows = read_metrics(metrics)
    band = beside_curve(rows, curve) if curve else []
    figure = Figure(figsize=(8, 6 if band else 4.5), dpi=120, layout="constrained")
    axes, *below = figure.subplots(2 if band else 1, squeeze=False, height_ratios=[3, 1] if band else None)[:, 0]
    axes.set(title=metrics.parent.name, xlabel="optimiser step", ylabel="loss")
    train, valid = (
        np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None])
        for name in ("loss", "val_loss")
    )
    if len(train):
        steps, losses = train.T
        window = np.ones(len(losses) // 30 * 2 + 1)  # covers 7 % of the run, and less at its ends
        smooth = np.convolve(losses, window, "same") / np.convolve(np.ones_like(losses), window, "same")
        axes.plot(steps, losses, color="#9ec5e8", linewidth=0.8, label="training")
        axes.plot(steps, smooth, color="#1f5f99", linewidth=1.8, label=f"training, averaged: {smooth[-1]:.3f}")
    if len(valid):
        axes.plot(*valid.T, ".-", color="#d1495b", markersize=9, linewidth=1, label=f"validation: {valid[-1, 1]:.3f}")
    if curve and below:
        draw_band(axes, below[0], np.array(band).T, curve)
    if axes.get_legend_handles_labels()[0]:  # not if every step was left out
        axes.legend(frameon=False)
    for panel in (axes, *below):
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png")
