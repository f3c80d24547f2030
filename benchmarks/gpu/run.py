"""Runs the parts of the GPU benchmark one after the other: see benchmarks/gpu/run.sh.

The parts are functions of benchmarks/gpu/parts.py, the most important first. A process does one after the other, since
starting one takes ten seconds. If a part takes too long or ends the process, the next ones get a new process. What was
measured is in $OUT after each part, whatever happens later.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.gpu.parts import PARTS, QUICK
from common.files import ROOT, atomic_file

OUT = Path(os.environ.get("OUT", ROOT / "out" / "gpu"))


class Results:
    """What the parts have said so far, on the disk after each."""

    def __init__(self, command: str):
        self.command, self.parts, self.began = command, {}, time.monotonic()

    def add(self, name: str, result: dict) -> None:
        self.parts[name] = result
        OUT.mkdir(parents=True, exist_ok=True)
        values = dict(command=self.command, seconds=round(time.monotonic() - self.began, 1), parts=self.parts)
        with atomic_file(OUT / "results.json") as temporary:
            temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
        with atomic_file(OUT / "report.md") as temporary:
            temporary.write_text(self.report(), encoding="utf-8")
        said = result.get("error") or result.get("skipped") or "done"
        print(f"[{values['seconds']:6.1f} s] {name}: {said}", flush=True)

    def report(self) -> str:
        """Markdown: a table a part."""
        lines = ["# GPU benchmark", "", f"`{self.command}`", ""]
        for name, result in self.parts.items():
            lines += [f"## {name}", ""]
            rows = {key: value for key, value in result.items() if key != "about"}
            lines += [result["about"], ""] if "about" in result else []
            lines += ["| | |", "|---|---|", *(f"| {key} | {_text(value)} |" for key, value in rows.items()), ""]
        return "\n".join(lines)


def _text(value) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:,.4g} [{value['least']:,.4g} .. {value['greatest']:,.4g}]"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def run_tests(args, chosen: str, limit: float) -> dict:
    """The tests marked `gpu` that -k `chosen` selects, in a process of their own."""
    if args.device == "cpu":
        return dict(skipped="no card")
    probe = subprocess.run([sys.executable, "-c", "import pytest"], capture_output=True)
    if probe.returncode:
        return dict(skipped="pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "--durations=10", "-p", "no:cacheprovider"]
    command += ["-vv", "-k", chosen]  # a line for each test, when it is done
    begin = len(_read("tests.txt"))
    with open(OUT / "tests.txt", "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        status = _wait(process, limit)
    lines = [line for line in _read("tests.txt")[begin:].splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if status is None:
        return dict(error=f"more than {limit:.0f} s; tests.txt has those that were done", failed=failed[:20])
    if status:
        return dict(error=f"{len(failed)} failed; see tests.txt", failed=failed[:20])
    return dict(passed=lines[-1].strip("= "))


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    """-> its status, or None if it had to be ended. As at Ctrl-C, after which pytest says what has failed. Twice, since
    a training run takes the first for itself."""
    for seconds, number in ((limit, signal.SIGINT), (5, signal.SIGINT), (8, signal.SIGKILL)):
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(seconds)
            return status if seconds == limit else None
        os.killpg(process.pid, number)
    process.wait()
    return None


def _read(name: str) -> str:
    path = OUT / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def run_parts(args, waiting: list[str], results: Results, left: Callable[[], float]) -> list[str]:
    """Starts a process for these parts -> those that are left when it has ended or was ended. left: seconds."""
    flags = [f"--device={args.device}", *(["--tiny"] if args.tiny else []), *(["--quick"] if args.quick else [])]
    command = [sys.executable, str(ROOT / "benchmarks/gpu/parts.py"), *flags, *waiting]
    with open(OUT / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )

    def end_within(seconds: float) -> threading.Timer:
        """Ends the process and those that it has started, unless it is told otherwise before."""
        timer = threading.Timer(min(seconds, max(left(), 1)), os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        return timer

    timer, current = end_within(90), waiting[0]
    for line in process.stdout:
        kind, _, rest = line.partition(" ")
        if kind not in ("BEGIN", "END"):
            continue
        timer.cancel()
        if kind == "BEGIN":
            current = rest.strip()
            timer = end_within(args.part_limit or PARTS[current].limit)
        else:
            name, _, result = rest.partition(" ")
            results.add(name, json.loads(result))
            waiting = [part for part in waiting if part != name]
    timer.cancel()
    status = process.wait()
    if current in waiting:
        why = "took too long" if status == -signal.SIGKILL else f"the process ended with {status}"
        results.add(current, dict(error=f"{why}; log.txt says more"))
        waiting = [part for part in waiting if part != current]
    return waiting


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer parts and rounds")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the script works")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part_limit", type=float, help="seconds of each part (default: its own limit)")
    parser.add_argument("--limit", type=float, help="seconds in all (default: 470, with --quick 115)")
    parser.add_argument(
        "--parts", default="", help=f"some of tests, {', '.join(PARTS)}, compiled (the tests that compile)"
    )
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", "tests.txt"):
        (OUT / name).write_text("", encoding="utf-8")
    wanted = args.parts.split(",") if args.parts else ["tests", *(QUICK if args.quick else (*PARTS, "compiled"))]
    limit = args.limit or (115 if args.quick else 470)
    results = Results(f"benchmarks/gpu/run.sh {' '.join(sys.argv[1:])}".strip())
    left = lambda: limit - (time.monotonic() - results.began)
    if "tests" in wanted:
        chosen = "kernel or head or experts or fp16 or logits" if args.quick else "not compiled"
        results.add("tests", run_tests(args, chosen, min(left(), 45 if args.quick else 120)))
    waiting = [part for part in PARTS if part in wanted]
    while waiting and left() > 10:
        waiting = run_parts(args, waiting, results, left)
    if "compiled" in wanted and left() > 10:
        results.add("compiled", run_tests(args, "compiled", left()))
    for part in waiting:
        results.add(part, dict(skipped="no time was left"))
    print(results.report())
    sys.exit(any("error" in result for result in results.parts.values()))


if __name__ == "__main__":
    main()
