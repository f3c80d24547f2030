"""The runs in out/runs, for the page /runs: which there are, and what they log, read as it grows.

    runs = Runs([Path("out/runs")])
    runs.overview()                             # [{"name": ..., "state": "training" | "done" | "stopped", "step": ...}]
    runs.read("pretrain_512-20261128-083512")   # {"series": {"loss": [[step, mean, least, most], ...], ...}, ...}

The log of a long run has a hundred megabytes. Only what is new is read, CHUNK bytes at a time, and what is kept and
sent of a series does not grow: neighbouring values become one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CHUNK = 4 << 20  # bytes that one `read` reads: a tenth of a second
POINTS = 300  # of a series; up to twice as many
NAMES, LOGS, LISTED = 40, 16, 200  # series of a run; runs whose series are kept; runs that are listed
TAIL = 16 << 10  # bytes at the end of a log that hold its last rows
PATIENCE, INTERVALS = 120.0, 5  # a run that has logged nothing for so many seconds, and intervals, has stopped


class Series:
    """A figure over the steps, in buckets of equally many steps. Too many buckets: neighbours join."""

    def __init__(self):
        self.width = 1  # steps of a bucket
        self.buckets: dict[int, list[float]] = {}  # step // width -> [count, sum of steps, of values, least, most]

    def add(self, step: int, value: float) -> None:
        self._join(self.buckets, step // self.width, [1, step, value, value, value])
        if len(self.buckets) > 2 * POINTS:
            self.width *= 2
            wider: dict[int, list[float]] = {}
            for key, bucket in self.buckets.items():
                self._join(wider, key // 2, bucket)
            self.buckets = wider

    @staticmethod
    def _join(buckets: dict[int, list[float]], key: int, new: list[float]) -> None:
        old = buckets.get(key)
        if old is None:
            buckets[key] = new
        else:
            sums = (a + b for a, b in zip(old[:3], new[:3]))
            buckets[key] = [*sums, min(old[3], new[3]), max(old[4], new[4])]

    def points(self) -> list[list[float]]:
        """[step, mean, least, most] of each bucket."""
        return [
            [round(steps / count, 1), *(float(f"{x:.6g}") for x in (total / count, least, most))]
            for count, steps, total, least, most in (self.buckets[key] for key in sorted(self.buckets))
        ]


class Log:
    """A metrics.jsonl, as far as it was read."""

    def __init__(self, path: Path):
        self.path = path
        self._restart(None)

    def _restart(self, file: tuple[int, int] | None) -> None:
        self.file, self.offset, self.rest = file, 0, b""
        self.series: dict[str, Series] = {}

    def advance(self) -> bool:
        """Reads on -> whether there is more. A run that is continued writes its file anew: then from the start."""
        with open(self.path, "rb") as file:
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) != self.file or found.st_size < self.offset:
                self._restart((found.st_dev, found.st_ino))
            file.seek(self.offset)
            new = file.read(CHUNK)
        self.offset += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        if len(self.rest) > CHUNK:  # not a row
            self.rest = b""
        for row in map(parse_row, lines):
            for name, value in row.items():
                if name != "step" and (name in self.series or len(self.series) < NAMES):
                    self.series.setdefault(name, Series()).add(int(row["step"]), value)
        return self.offset < found.st_size


def parse_row(line: bytes) -> dict[str, float]:
    """The numbers of a row with a step; of anything else, nothing."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 1e12:
        return {}
    kinds = (int, float)
    return {name[:64]: value for name, value in row.items() if type(value) in kinds and -1e300 < value < 1e300}


class Runs:
    """folders: where runs are, <folder>/<run>/metrics.jsonl. What is outside of them is never read, links included."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = list({folder.resolve(): folder for folder in folders}.values())
        self.logs: dict[Path, Log] = {}  # the least recently read first
        self.lock = threading.Lock()  # answers are made in threads

    def overview(self) -> list[dict[str, Any]]:
        """What there is to know of each run without reading its log; the one that was changed last comes first."""
        found = []
        for path in self._runs().values():
            with suppress(FileNotFoundError):  # removed since it was listed
                found.append(self._facts(path))
        return sorted(found, key=lambda run: run["ago"])[:LISTED]

    def read(self, name: str) -> dict[str, Any] | None:
        """The series of a run as far as they were read, and whether there is more; None if there is no such run."""
        path = self._runs().get(name)
        if path is None:
            return None
        with self.lock:
            log = self.logs.pop(path, None) or Log(path / "metrics.jsonl")
            self.logs[path] = log
            if len(self.logs) > LOGS:
                del self.logs[next(iter(self.logs))]
            more = log.advance() if is_file(log.path) else False
            series = {name: one.points() for name, one in log.series.items()}
        config = self._info(path).get("config")
        settings = {str(k): str(v)[:200] for k, v in config.items()} if isinstance(config, dict) else {}
        return {"name": name, "series": series, "more": more, "settings": settings}

    def _runs(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in folder.iterdir() if folder.is_dir() else ():
                if not path.is_symlink() and any(is_file(path / name) for name in ("metrics.jsonl", "run.json")):
                    found.setdefault(path.name, path)
        return found

    def _info(self, path: Path) -> dict[str, Any]:
        """run.json, which the trainer writes when a run begins and when it is done (trainer/run/logger.py)."""
        try:
            with open(path / "run.json", "rb") as file:
                info = json.loads(file.read(CHUNK)) if is_file(path / "run.json") else None
        except (OSError, ValueError, RecursionError):
            info = None
        return info if isinstance(info, dict) else {}

    def _facts(self, path: Path) -> dict[str, Any]:
        info, rows, changed, size = self._info(path), [], 0.0, 0
        for name in ("run.json", "metrics.jsonl"):
            if is_file(path / name):
                with open(path / name, "rb") as file:
                    about = os.fstat(file.fileno())
                    changed, size = max(changed, about.st_mtime), about.st_size
                    if name == "metrics.jsonl":
                        file.seek(max(0, about.st_size - TAIL))
                        rows = [row for row in map(parse_row, file.read(TAIL).split(b"\n")) if row]
        ago = max(0.0, time.time() - changed)
        times = [row["seconds"] for row in rows if "seconds" in row]
        interval = times[-1] - times[-2] if len(times) > 1 else 0.0
        done = isinstance(info.get("summary"), dict)
        state = "done" if done else "training" if ago < max(PATIENCE, INTERVALS * interval) else "stopped"
        last: dict[str, float] = {}
        for row in rows:
            last |= row
        known = {key: info[key] for key in ("parameters", "total_steps") if type(info.get(key)) is int}
        return {"name": path.name, "state": state, "ago": round(ago, 1), "version": size, "last": last} | known


def is_file(path: Path) -> bool:
    """Whether it is one itself, not a link to one that may be anywhere."""
    return path.is_file() and not path.is_symlink()
