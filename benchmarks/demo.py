"""The demo with several seeds and worlds: minutes, and what each stage's model reaches in the exam.

    python benchmarks/demo.py                                     # as `make demo`: one seed, one world
    python benchmarks/demo.py --seeds 42 1 2 --worlds 0 1         # six demos

What is trained already is not trained again, so it can be stopped; minutes are only printed for a whole demo.
"""

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import machine, show
from common.files import ROOT
from scripts.demo import STAGES, Demo, DemoConfig, examine

ZH, EN = "the exam, asked in Chinese", "the exam, asked in English"
AIMS = {  # what each stage is for
    ("full_sft", ZH): 0.88,
    ("full_sft", EN): 0.88,
    ("lora_identity", "identity in unseen wordings"): 0.95,
    ("rlhf", "held-out pairs: prefers the kind one"): 0.90,
    ("reason", "problems of several steps"): 0.92,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="of the trainings")
    parser.add_argument("--worlds", nargs="+", type=int, default=[0], help="seeds of the tiny world")
    parser.add_argument("--save_dir", type=Path, default=ROOT / "out" / "benchmarks" / "demo")
    args = parser.parse_args()

    results, minutes = {}, []
    for world in args.worlds:
        for seed in args.seeds:
            folder = args.save_dir / f"world_{world}_seed_{seed}"
            whole = not any(stage.file(folder).exists() for stage in STAGES)
            config = DemoConfig(save_dir=str(folder), world_seed=world, seed=seed)
            begin = time.monotonic()
            Demo(config).train()
            results[world, seed] = examine(config)
            minutes += [(time.monotonic() - begin) / 60] * whole

    print(f"\n{machine()}")
    if minutes:
        show("the demo, without its last page", minutes, "minutes")
    first, *_ = results.values()
    for stage, figures in first.items():
        for figure in figures:
            values = [100 * result[stage][figure] for result in results.values()]
            aim = AIMS.get((stage, figure))
            show(f"{stage}: {figure}", values, "%", f"{aim:.0%}" if aim else "")
    for (stage, figure), aim in AIMS.items():
        below = [name for name, result in results.items() if result[stage][figure] < aim]
        if below:
            names = ", ".join(f"world {world} seed {seed}" for world, seed in below)
            print(f"below the aim: {figure}, in {names}")


if __name__ == "__main__":
    main()
