"""python dataset/tiny_world --seed 0 --save_dir out/tiny_world     # its six files, a few seconds"""

import argparse
import sys
from pathlib import Path

if not __package__:  # python dataset/tiny_world: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dataset.tiny_world.files import generate
from dataset.tiny_world.rows import FILES


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the six files of the tiny world.")
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument(
        "--save_dir", default=Path(__file__).resolve().parents[2] / "out/tiny_world", help="where to write"
    )
    args = parser.parse_args()
    for path in generate(args.save_dir, args.seed, tuple(FILES)).values():
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
