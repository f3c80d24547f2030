"""Damage to the newest state: is it always noticed, the file named, and the state before taken?

    python benchmarks/faults/damage.py

There are two states of a small model. Each file of the newer one, its manifest too, is damaged in these ways: one bit
flipped, at 40 places; cut at every twentieth of its length; one byte longer; deleted; replaced by the older state's.
"""

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.faults.operations import save
from trainer.run import resume

FLIPS, CUTS = 40, 20


def damages(older: Path, newer: Path, chooser: random.Random) -> Iterator[tuple[str, str, bytes | None]]:
    """(file, what is done to it, its bytes then; None: it is deleted)"""
    for path in sorted(newer.iterdir()):
        whole, name = path.read_bytes(), path.name
        for place in sorted(chooser.sample(range(len(whole) * 8), FLIPS)):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            yield name, f"bit {place} flipped", bytes(flipped)
        for part in range(CUTS):
            yield name, f"cut to {part}/{CUTS}", whole[: len(whole) * part // CUTS]
        yield name, "one byte longer", whole + b"\0"
        yield name, "deleted", None
        yield name, "the older one's", (older / name).read_bytes()


def main() -> int:
    tried, faults = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2):
            save(Path(folder), step, step)
        older, newer = (Path(folder, "run", f"step_0000000{step}") for step in (1, 2))
        for name, what, content in list(damages(older, newer, random.Random(0))):
            whole = (newer / name).read_bytes()
            if content == whole:
                continue
            tried += 1
            (newer / name).unlink() if content is None else (newer / name).write_bytes(content)
            said = []
            taken = resume.newest_state(Path(folder, "run"), said.append)
            # a damaged manifest may blame the file that it no longer describes
            named = said and newer.name in said[0] and (name in said[0] or name == "manifest.json")
            if taken != older or not named:
                faults.append(f"{name}, {what}: took {taken}, said {said}")
            aside = newer.with_name(f"broken-{newer.name}")
            if aside.exists():
                os.rename(aside, newer)
            (newer / name).write_bytes(whole)
        whole_again = resume.newest_state(Path(folder, "run")) == newer
    noticed = tried - len(faults)
    print(f"damage to the newest state: {tried} kinds tried, {noticed} noticed, named, and the one before taken")
    print("".join(f"    {fault}\n" for fault in faults[:5]), end="")
    return int(bool(faults) or not whole_again)


if __name__ == "__main__":
    sys.exit(main())
