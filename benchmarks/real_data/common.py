"""What the benchmarks on real data share: rows held out, and the stages as users run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.files import ROOT


def hold_out(source: Path, folder: Path, chosen) -> tuple[Path, Path]:
    """chosen: from the number of a row, whether it is held out -> (file of the others, file of these)."""
    with open(source, "rb") as file:
        rows = list(file)
    paths = folder / f"{source.stem}.train.jsonl", folder / f"{source.stem}.held_out.jsonl"
    for path, wanted in zip(paths, (False, True)):
        path.write_bytes(b"".join(row for i, row in enumerate(rows) if chosen(i) == wanted))
    return paths


def stage(name: str, *flags: object) -> None:
    command = [sys.executable, str(ROOT / f"trainer/train_{name}.py"), *map(str, flags)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)
