"""Step time of a mixture with 4 and with 16 experts of equal active size: it should not grow with their number.

python benchmarks/moe.py
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import machine, seconds, show
from model.config import ModelConfig
from model.precision import pick_dtype
from model.transformer import CausalLM
from trainer.loop.optim import build_optimizers, clip_and_check


def build(experts: int, dtype: torch.dtype):
    """Two experts of 448 for each token, out of `experts`: a step over (4, 512) random tokens."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.preset("small", num_hidden_layers=4, num_experts=experts, moe_intermediate_size=448))
    model.compute_dtype = dtype
    (optimizer,) = build_optimizers(model, "adamw", 0.1)
    optimizer.param_groups[0]["lr"] = 1e-4

    def step(tokens: torch.Tensor) -> float:
        out = model(tokens, targets=tokens.roll(-1, 1))
        (out.loss.mean() + out.aux_loss.mean()).backward()
        clip_and_check(list(model.parameters()), 1.0, 1.0, torch.tensor(True))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.loss.mean().item()

    return model, step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    dtype, _ = pick_dtype("auto", torch.device("cpu"))
    tokens = torch.randint(6400, (4, 512))
    sides = {experts: build(experts, dtype) for experts in (4, 16)}
    for experts, (model, step) in sides.items():
        active, total = model.num_parameters(active=True), model.num_parameters()
        print(f"{experts:2} experts: {active:,} active of {total:,} parameters, loss {step(tokens):.3f}")
    times = {experts: [] for experts in sides}
    for _ in range(args.rounds):
        for experts, (_, step) in sides.items():
            times[experts].append(seconds(lambda: step(tokens)))  # noqa: B023
    print(f"\n{machine()}")
    for experts, values in times.items():
        show(f"{experts} experts", values, "s a step")
    show("16 experts against 4", [b / a for a, b in zip(times[4], times[16])], "times as long", "1.3 at most")


if __name__ == "__main__":
    main()
