"""Counts what a program asked of the card of run.py --log.

python benchmarks/gpu/no_card/summary.py log.txt
python benchmarks/gpu/no_card/summary.py log_10.txt log_30.txt --steps 20    # what each of the 20 more steps asked
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from common.console import UserError, run

# Attention by the names of its kernels, in this order. Without a kernel of its own it is two products with a softmax
# between them; compiled code and sampling may have a softmax, too. The head's is a logarithm, and is not counted.
ATTENTION = {
    "flash": re.compile(r"flash_(fwd|bwd)|flash.*(splitkv|combine)"),
    "mem-efficient": re.compile(r"fmha_|AttentionKernel|AttentionBackwardKernel"),
    "cuDNN": re.compile(r"cudnn.*(sdpa|fmha|flash)", re.IGNORECASE),
    "math (softmax)": re.compile(r"softmax", re.IGNORECASE),
}
LOG_SOFTMAX = re.compile(r"log_?softmax|softmax_warp_(forward|backward)I\w*?Li\d+ELb1E", re.IGNORECASE)
PRODUCT = re.compile(r"cublas|gemm", re.IGNORECASE)


def counts(lines: Iterable[str]) -> Counter:
    """What is counted, by name: "kernels", "waits: cudaStreamSynchronize", "copies: to-card-pinned", its bytes, ..."""
    found: Counter = Counter()
    for line in lines:
        kind, _, text = (line.rstrip("\n").split(" ", 2) + ["", ""])[:3]
        if kind == "kernel":
            found.update(kinds(text))
        elif kind == "copy":
            way, size = text.split()
            found[f"copies: {way}"] += 1
            found[f"copies: {way}, bytes"] += int(size)
        elif kind == "nccl":
            found[f"NCCL: {text.split()[0]}"] += 1
            found[f"NCCL: {text.split()[0]}, bytes"] += int(text.split()[1])
        elif kind in ("malloc", "free"):
            found[f"memory: {kind}"] += 1
            found[f"memory: {kind}, bytes"] += int(text)
        elif kind == "graph":
            found["graphs: launched"] += 1
            found["graphs: kernels in them"] += int(text)
        elif kind == "capture":
            found["graphs: captured"] += text.startswith("end")
        elif kind in ("wait", "broken", "stray", "missing"):
            title = dict(
                wait="waits", broken="captures broken by", stray="default stream during a capture", missing="missing"
            )
            found[f"{title[kind]}: {text[:60]}"] += 1
    return Counter({name: number for name, number in found.items() if number})


@cache  # logs have millions of lines, and few names
def kinds(kernel: str) -> list[str]:
    """What one launch of the kernel counts as."""
    found = ["kernels"]
    found += ["kernels: products"] if PRODUCT.search(kernel) else []
    found += ["kernels: compiled by Triton"] if kernel.startswith("triton_") else []
    if not LOG_SOFTMAX.search(kernel):
        found += [f"attention: {name}" for name, pattern in ATTENTION.items() if pattern.search(kernel)][:1]
    return found


def table(columns: dict[str, dict[str, float]]) -> str:
    names = sorted(set().union(*columns.values()))
    widths = [max(map(len, [*names, ""])), *(max(16, len(title)) for title in columns)]
    lines = [["", *columns]]
    lines += [[name, *(f"{values.get(name, 0):,.10g}" for values in columns.values())] for name in names]
    text = lambda row: "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
    return "\n".join(map(text, lines))


def read(path: str) -> Counter:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return counts(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="of a run")
    parser.add_argument("longer", nargs="?", help="of the same run with more steps")
    parser.add_argument("--steps", type=int, help="how many more")
    given = parser.parse_args(words)
    if bool(given.longer) != bool(given.steps) or (given.steps or 1) < 1:
        parser.error("a second log and --steps, how many steps it has more, belong together")
    columns: dict[str, dict[str, float]] = {Path(given.log).name: read(given.log)}
    if given.longer:
        one, two = columns[Path(given.log).name], read(given.longer)
        each = {name: (two.get(name, 0) - one.get(name, 0)) / given.steps for name in {*one, *two}}
        columns = {"shorter": one, "longer": two, "each step": each}
    print(table(columns))


if __name__ == "__main__":
    run(main)
