"""What a mixture of experts costs: the preset `moe` against the dense model of equal active size, and 16 experts
against 4 of equal size.

    python benchmarks/moe.py                       # 4 x 512 tokens, compiled, the CPU's best precision
    python benchmarks/moe.py --compile off

All are whole optimiser steps of the library (AdamW), in turns within one process.
"""

import argparse
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import engine_step, machine, seconds, show
from benchmarks.train_step import our_engine
from model.config import ModelConfig

MIXTURE = ModelConfig.preset("moe")
ACTIVE = (MIXTURE.num_experts_per_tok + MIXTURE.num_shared_experts) * MIXTURE.moe_intermediate_size
FEW = dict(num_hidden_layers=4, moe_intermediate_size=448)
SHAPES = {
    "moe": MIXTURE,
    "dense": ModelConfig.preset("moe", num_experts=0, num_shared_experts=0, intermediate_size=ACTIVE),
    "16 experts": ModelConfig.preset("small", num_experts=16, **FEW),
    "4 experts": ModelConfig.preset("small", num_experts=4, **FEW),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", default="on")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        times = {}
        for pair, aim in ((("moe", "dense"), "1.25"), (("16 experts", "4 experts"), "1.3")):
            engines = {}
            for name in pair:
                shape = SHAPES[name]
                engine = engines[name] = our_engine(args, shape, folder)
                engine.model.train()
                total, active = engine.model.num_parameters(), engine.model.num_parameters(active=True)
                print(f"{name}: {total:,} parameters, {active:,} of them active")
            for step in range(2 + args.rounds):
                for name, engine in engines.items():
                    batches = engine.loader.batches(step)
                    taken = seconds(lambda: engine_step(engine, batches))  # noqa: B023
                    if step >= 2:  # the first ones compile
                        times.setdefault(name, []).append(taken)
            print(f"\n{machine()}; {args.rows} x {args.length}, {engine.dtype}, compile {args.compile}")
            for name in pair:
                show(name, times[name], "s a step")
            ratios = [a / b for a, b in zip(*(times[name] for name in pair))]
            show(" against ".join(pair), ratios, "times as long", f"{aim} at most")


if __name__ == "__main__":
    main()
