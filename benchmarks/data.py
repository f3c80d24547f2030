"""The data path: how fast a file is indexed and tokenised, how soon training starts the second time, at what memory.

    python benchmarks/data.py                    # generates 1 GB in a temporary folder, a few minutes
    python benchmarks/data.py --size_mb 100      # quicker

A start is measured in a process of its own, after its imports: from the path to the first batch, and the memory it
takes at most in its first 200 steps, over what it had after the imports. For it the tokens come from a stand-in
tokenizer (every fourth byte is a token), because how long tokenising took does not matter to a second start; the
tokenizer's own speed is measured on a sample, in turns with `tokenizers.encode_batch` alone.
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

import numpy as np
import torch  # noqa: F401  it is part of every start's baseline

from benchmarks.common import machine, show
from dataset.batches.loader import Loader
from dataset.read.jsonl import Jsonl
from dataset.tokens import token_cache
from dataset.tokens.examples import PretrainDataset
from dataset.tokens.order import shuffled
from tokenizer.text import Tokenizer

STEPS, PER_STEP, MAX_SEQ_LEN = 200, 32, 512
MIB = 1 << 20


class EveryFourthByte:
    """A stand-in for a tokenizer, as fast as a disk."""

    vocab_size, hash, path, end_of_text, start_of_text = 259, "every fourth byte", "", 0, [0]

    @classmethod
    def load(cls, path: str) -> "EveryFourthByte":
        return cls()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [(np.frombuffer(text.encode()[::4], np.uint8) + np.uint16(3)).tolist() for text in texts]


def generate(path: Path, size: int) -> None:
    """About `size` bytes of rows of about 1 kB, Chinese and English, no two the same."""
    random.seed(0)
    words = "the a small sparrow river letter seven green old walks because 麻雀 虽小 五脏俱全 今天 我们 学习".split()
    pool = [" ".join(random.choices(words, k=random.randint(20, 250))) for _ in range(2000)]
    with open(path, "w", encoding="utf-8") as file:
        row = 0
        while file.tell() < size:
            for text in random.sample(pool, len(pool)):
                file.write(json.dumps({"text": f"{row} {text}"}, ensure_ascii=False) + "\n")
                row += 1


# ---- one start, in a process of its own


def memory(what: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes; 0 where /proc is missing."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(what))


def start(path: str) -> None:
    baseline = memory("VmRSS")
    if baseline:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    began = time.perf_counter()
    ds = PretrainDataset(path, EveryFourthByte(), max_seq_len=MAX_SEQ_LEN)
    loader = Loader(ds, packing=False, batch_size=PER_STEP, accumulation_steps=1, max_seq_len=MAX_SEQ_LEN)
    steps = loader.prefetch(0, min(STEPS, loader.steps_per_epoch))
    next(steps)
    first_batch = time.perf_counter() - began
    began, count = time.perf_counter(), 0
    for _, batches in steps:
        count += sum(batch.trained_tokens for batch in batches)
    rate = count / (time.perf_counter() - began)
    rows = len(Jsonl(path))
    print(json.dumps(dict(first_batch=first_batch, rate=rate, rows=rows, memory=memory("VmHWM") - baseline)))


def run_start(path: Path) -> dict:
    command = [sys.executable, __file__, "--start", str(path)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


# ---- the report


def tokenising(path: Path, folder: Path, sample: int, rounds: int) -> None:
    """Our token cache (reading, parsing, writing included) in turns with the bare library on the same texts."""
    tokenizer = Tokenizer.load()
    size, texts = 0, []
    for chunk in Jsonl(path).chunks(MIB):
        texts += [json.loads(row)["text"] for row in chunk.rows]
        size += sum(map(len, chunk.rows))
        if size >= sample:
            break
    part = folder / "part.jsonl"
    part.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    ours, bare = [], []
    for turn in range(rounds):
        began = time.perf_counter()
        token_cache.token_caches(part, tokenizer, "text", cache_dir=folder / f"turn{turn}")
        ours.append(size / 1e6 / (time.perf_counter() - began))
        began = time.perf_counter()
        for i in range(0, len(texts), 10_000):  # all at once it is slower: memory
            tokenizer._plain.encode_batch(texts[i : i + 10_000], add_special_tokens=False)
        bare.append(size / 1e6 / (time.perf_counter() - began))
    ratio = statistics.median(ours) / statistics.median(bare)
    show("token cache", ours, "MB/s")
    show("tokenizers.encode_batch alone", bare, "MB/s")
    show("token cache against it", ratio, "", ">= 0.9")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size_mb", type=int, default=1000, help="size of the generated file")
    parser.add_argument("--sample_mb", type=int, default=160, help="how much of it the real tokenizer gets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        return start(args.start)
    folder = Path(tempfile.mkdtemp(prefix="sparrow-data-"))
    try:
        print(machine())
        path = folder / "data.jsonl"
        generate(path, args.size_mb * 1_000_000)
        size = path.stat().st_size / 1e6
        rates = []
        for turn in range(args.rounds):
            began = time.perf_counter()
            rows = len(Jsonl(path, cache_dir=folder / f"index{turn}"))
            rates.append(size / (time.perf_counter() - began))
        show(f"indexing {size:,.0f} MB, {rows:,} rows", rates, "MB/s", ">= 200")
        tokenising(path, folder, args.sample_mb * 1_000_000, args.rounds)
        allowed = 150 + 32 * rows / MIB
        for name in ("first start (tokenises)", "second start"):
            found = run_start(path)
            show(f"{name}: first batch", found["first_batch"], "s", "<= 2" if name == "second start" else "")
            show(f"{name}: peak over baseline", found["memory"] / MIB, "MiB", f"<= {allowed:.0f}")
        show("batches from the cache", found["rate"], "tokens/s")
        began = time.perf_counter()
        shuffled(10_000_000, 42, 0)[9_999_999]
        show("seek to row 10,000,000", time.perf_counter() - began, "s", "<= 1")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
