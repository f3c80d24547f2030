"""Writes the six files of the tiny world, in a few seconds.

python dataset/tiny_world --seed 0 --save_dir out/tiny_world
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # python dataset/tiny_world: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.console import run, say
from common.files import ROOT
from common.options import Options, option, parse
from common.values import SEEDS
from dataset.tiny_world.files import generate
from dataset.tiny_world.rows import FILES


@dataclass(frozen=True)
class WorldConfig(Options):
    """Options of the tiny world"""

    seed: int = option(0, "which world", within=SEEDS)
    save_dir: str = option(str(ROOT / "out" / "tiny_world"), "where its six files are written", path=True)


def main() -> None:
    config = parse(WorldConfig, description=__doc__)
    for path in generate(config.save_dir, config.seed, tuple(FILES)).values():
        say(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
