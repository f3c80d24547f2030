"""The largest batches that fit on cards of several sizes: what torch takes, beside what model/cost.py expects.

python benchmarks/gpu/no_card/run.py python benchmarks/gpu/no_card/memory.py    # all models, eager and compiled
python benchmarks/gpu/no_card/run.py python benchmarks/gpu/no_card/memory.py small lora --compile off

It can also run on a real card. Each number of rows has a process of its own: ten seconds, compiled half a minute.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.memory_table import CARDS, MODELS
from common.console import UserError, run
from model.cost import batch_bytes, frozen_bytes, state_bytes
from model.lora import LoRASettings, add_lora, freeze

CASES = {  # name: preset or published shape, length of a row, rank of the adapter (0: all weights are trained), title
    "small": ("small", 512, 0, "`small`"),
    "base": ("base", 2048, 0, "`base`"),
    "moe": ("moe", 512, 0, "`moe`"),
    "lora": ("Qwen2-0.5B", 1024, 8, "LoRA on 0.5B (Qwen2.5's shape)"),
    "full": ("Qwen2-0.5B", 1024, 0, "the same, all weights"),
}
CONTEXT = 0.6 * 2**30  # bytes that CUDA itself takes on a card: 0.5 to 0.6 GiB with torch's kernels
FREE = 0.03  # share of a card that is left free


def fits(reserved: float, card: int) -> bool:
    """Whether the allocator's bytes fit on a card of so many GB (10^9 bytes; most have a little more)."""
    return reserved + CONTEXT <= (1 - FREE) * card * 1e9


def apart(work: Callable, *values):
    """Its result, computed in a process of its own: torch's compiler keeps the weights of a model that is gone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *values).result()


def measure(folder: str, name: str, rows: int, compiled: str, documents: int) -> tuple[int, int, int] | None:
    """Bytes at the peak of three steps: allocated, reserved, expected. None: out of memory."""
    bench = Bench("cuda", tiny=False, quick=True, folder=folder)
    shape, length, rank, _ = CASES[name]
    config = MODELS.get(shape) or bench.shape(shape)
    try:
        model = bench.model(config)
        if rank:
            freeze(model)
            add_lora(model, LoRASettings(rank=rank))
        data = bench.rows(rows * 2, length, config.vocab_size, documents)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its settings
            engine = bench.engine(model, data, rows, length, f"--compile={compiled}", "--optimizer=adamw")
            step = bench.step_of(engine)
            for _ in range(3):
                step()
    except torch.OutOfMemoryError:
        return None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    width = engine.dtype.itemsize
    expected = state_bytes(trained, frozen_bytes(config, width) if rank else 0, moments=2)
    expected += batch_bytes(config, rows, length, width, frozen_head=rank > 0)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), expected


def measured(folder: str, name: str, compiled: str, documents: int) -> dict[int, int]:
    """Rows, doubled until the largest card is too small -> bytes reserved. Prints a line for each."""
    taken: dict[int, int] = {}
    rows = 1
    while not taken or fits(taken[rows // 2], max(CARDS)):
        found = apart(measure, folder, name, rows, compiled, documents)
        about = f"{name}, {'compiled' if compiled == 'on' else 'eager'}, {rows} x {CASES[name][1]:,}"
        if found is None:
            print(f"{about}: out of memory", flush=True)
            break
        allocated, taken[rows], expected = found
        words = zip(("allocated", "reserved", "expected"), found)
        sizes = ", ".join(f"{word} {size / 2**30:.2f}" for word, size in words)
        print(f"{about}: {sizes} GiB; expected / allocated {expected / allocated:.3f}", flush=True)
        rows *= 2
    return taken


def table(taken: dict[str, dict[int, int]]) -> str:
    """As in docs/gpu.md: the largest power of two that fits, for each card and model."""
    lines = [f"| memory | {' | '.join(CASES[name][3] for name in taken)} |", f"|---|{'---|' * len(taken)}"]
    for card in CARDS:
        cells = []
        for name, sizes in taken.items():
            largest = max((rows for rows, reserved in sizes.items() if fits(reserved, card)), default=0)
            cells.append(f"{largest} × {CASES[name][1]:,}" if largest else "too large")
        lines.append(f"| {card} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="both")
    parser.add_argument("--documents", type=int, default=0, help="tokens of a document in packed rows; 0: one in each")
    given = parser.parse_args(words)
    if unknown := set(given.cases) - set(CASES):
        raise UserError(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if not torch.cuda.is_available():
        raise UserError("there is no card; put `python benchmarks/gpu/no_card/run.py` in front of this command")
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for compiled in ("off", "on") if given.compile == "both" else (given.compile,):
            taken = {name: measured(folder, name, compiled, given.documents) for name in given.cases or CASES}
            tables.append(f"{'Compiled' if compiled == 'on' else 'Eager'}:\n\n{table(taken)}")
    print("", *tables, sep="\n\n")


if __name__ == "__main__":
    run(main)
