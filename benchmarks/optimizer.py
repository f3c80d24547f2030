"""One step of each optimiser on a model's gradients, in turns: Muon, torch.optim.Muon, and AdamW.

    python benchmarks/optimizer.py                           # nano
    python benchmarks/optimizer.py --presets small --rounds 2

The gradients are random numbers. In all but the last, AdamW moves embedding, head and norms.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import machine, seconds, show
from model.config import ModelConfig
from model.transformer import CausalLM
from trainer.loop import optim

SIDES = ("Muon", "torch.optim.Muon", "AdamW")


def build(side: str, model: CausalLM) -> list[torch.optim.Optimizer]:
    """Optimisers of all parameters of the model."""
    ours = optim.build_optimizers(model, "adamw" if side == "AdamW" else "muon", 0.1)
    if side == "torch.optim.Muon":
        matrices = ours[0].param_groups[0]["params"]
        ours[0] = torch.optim.Muon(matrices, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    return ours


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["nano"])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()

    print(machine())
    for preset in args.presets:
        torch.manual_seed(0)
        model = CausalLM(ModelConfig.preset(preset))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizers = {side: build(side, model) for side in SIDES}
        for own in optimizers.values():
            optim.set_rates(own, 1e-5)

        def step(side: str) -> None:
            for optimizer in optimizers[side]:  # noqa: B023
                optimizer.step()

        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for n in range(args.rounds + 1):  # the first warms up
            for side in SIDES:
                took = seconds(lambda: step(side))  # noqa: B023
                if n:
                    times[side].append(took * 1000)
        for side in SIDES:
            show(f"{preset}, {side}", times[side], "ms")
        ratios = [theirs / own for own, theirs in zip(times["Muon"], times["torch.optim.Muon"])]
        show(f"{preset}, Muon against torch.optim.Muon", ratios, "times as fast")


if __name__ == "__main__":
    main()
