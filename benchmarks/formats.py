"""Reading any layout: MB/s of one core from bytes to canonical rows and to our files, and the data doctor's speed.

    python benchmarks/formats.py                  # 20 MB of each layout, 200 MB for the doctor: a few minutes
    python benchmarks/formats.py --size_mb 2 --doctor_mb 4        # to see that it runs

Rows are of about 650 bytes, Chinese and English, no two the same. `json.loads` alone is measured beside it, in turns:
what no reader on the standard library can beat. The doctor runs in a process of its own, for its memory.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import machine, show
from dataset.read.jsonl import Jsonl
from dataset.read.mapping import find_reader
from dataset.read.mix import prepare

WORDS = "the a small sparrow river letter seven green walks because 麻雀 虽小 五脏俱全 今天 我们 学习 怎么样".split()


def said(count: int) -> str:
    return " ".join(random.choices(WORDS, k=count))


def turns(asked: str, answer: str, role="role", content="content", user="user", assistant="assistant") -> list[dict]:
    return [{role: user, content: asked}, {role: assistant, content: answer}]


LAYOUTS = {
    "text": lambda q, a: {"text": f"{q} {a}"},
    "messages": lambda q, a: {"messages": turns(q, a)},
    "conversations": lambda q, a: {"conversations": turns(q, a)},
    "messages, content in parts": lambda q, a: {"messages": turns(*([{"type": "text", "text": t}] for t in (q, a)))},
    "ShareGPT": lambda q, a: {"conversations": turns(q, a, "from", "value", "human", "gpt")},
    "Alpaca": lambda q, a: {"instruction": q, "input": "", "output": a, "history": [["hi", "hello"]]},
    "prompt, completion": lambda q, a: {"prompt": q, "completion": a},
    "conversation[human, assistant]": lambda q, a: {"system": "be", "conversation": [{"human": q, "assistant": a}]},
    "chosen, rejected in full": lambda q, a: {"chosen": turns(q, a), "rejected": turns(q, a[::-1])},
    "prompt + chosen, rejected": lambda q, a: {"prompt": q, "chosen": a, "rejected": a[::-1]},
}


def generate(path: Path, row, size: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            file.write("".join(json.dumps(row(said(25), said(60)), ensure_ascii=False) + "\n" for _ in range(500)))


def speeds(path: Path, ours: Path, rounds: int) -> list[float]:
    """MB/s of reading to canonical rows, of converting the file, and of json.loads; in turns, medians."""
    rows = Jsonl(path)
    read, raws = find_reader(rows), [rows.raw(i) for i in range(len(rows))]
    ways = (
        lambda: [read(raw) and None for raw in raws],
        lambda: prepare([str(path)], [], target=ours),
        lambda: [json.loads(raw) and None for raw in raws],
    )
    found = [[] for _ in ways]
    for _ in range(rounds):
        for way, own in zip(ways, found):
            began = time.process_time()
            way()
            own.append(path.stat().st_size / 1e6 / (time.process_time() - began))
    return list(map(statistics.median, found))


def layouts(folder: Path, size: int, rounds: int) -> None:
    for name, row in LAYOUTS.items():
        generate(folder / "rows.jsonl", row, size)
        a, b, c = speeds(folder / "rows.jsonl", folder / "ours.jsonl", rounds)
        for what, speed in (("canonical rows", a), ("our file", b), ("json.loads alone", c)):
            show(f"{name}: {what}", speed, "MB/s", "" if speed is c else ">= 50")
    array = folder / "rows.json"
    generated = [LAYOUTS["Alpaca"](said(25), said(60)) for _ in range(size // 650)]
    array.write_text(json.dumps(generated, ensure_ascii=False, indent=1), encoding="utf-8")
    began = time.process_time()
    Jsonl(array)
    speed = array.stat().st_size / 1e6 / (time.process_time() - began)
    show("a .json array, once", speed, "MB/s", ">= 50")


DOCTOR = """
import json, sys, time
sys.path[0] = {root!r}
from benchmarks.data import memory
from dataset.doctor.examine import examine
from tokenizer.text import Tokenizer
tokenizer = Tokenizer.load()
before, began = memory("VmRSS"), time.perf_counter()
found = examine({path!r}, tokenizer).report
print(json.dumps([time.perf_counter() - began, (memory("VmHWM") - before) / 2**20, found.rows, found.size / 1e6]))
"""


def doctor(folder: Path, size: int, rounds: int) -> None:
    path = folder / "big.jsonl"
    generate(path, LAYOUTS["conversations"], size)
    found = []
    for _ in range(rounds):
        code = DOCTOR.format(root=str(Path(__file__).resolve().parents[1]), path=str(path))
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        seconds, mib, rows, megabytes = json.loads(done.stdout)
        found.append(megabytes / seconds)
    show("check_data", found, "MB/s", ">= 20")
    show(f"check_data, {rows:,} rows, {megabytes:.0f} MB: memory over the start", mib, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size_mb", type=int, default=20, help="of each layout")
    parser.add_argument("--doctor_mb", type=int, default=200, help="of the file for the doctor")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    random.seed(0)
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="sparrow-formats-"))
    try:
        layouts(folder, args.size_mb * 1_000_000, args.rounds)
        doctor(folder, args.doctor_mb * 1_000_000, args.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
