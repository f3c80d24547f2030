"""What the real thing costs: MiniMind's fast combination (pretrain_hq + sft_mini_512) on one RTX 3090, theirs and ours.

    python benchmarks/cost.py                                              # the table of docs/cost.md
    python benchmarks/cost.py --positions_per_second 250000 --token_ratio 0.5 --price_per_hour 1.3

A model, not a measurement. It starts from what MiniMind's README claims, works out what that means, and changes two
things: no position is spent on padding, and the recipe needs a share of the tokens. docs/cost.md explains each line.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model.config import ModelConfig
from model.cost import step_flops

LENGTH = 512  # of its rows, in both stages
BYTES_PER_CHARACTER = 3  # Chinese in UTF-8
CHARACTERS_PER_TOKEN = 1.6  # its README: 1.5 to 1.7
PEAK = 71e12  # FLOP/s in bf16, from Nvidia's data sheet of the RTX 3090


@dataclass(frozen=True)
class Claim:
    """A stage of MiniMind's, as its README describes it."""

    name: str
    hours: float
    file_bytes: float
    rows: float


PRETRAIN = Claim("pretrain_hq", 1.1, 1.6e9, 44_160 * 32)  # steps x batch size of its published logs
# nobody has published the rows of sft_mini_512: as many as an hour reads at the same speed
SFT = Claim("sft_mini_512", 1.0, 1.2e9, PRETRAIN.rows * 1.0 / 1.1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--price_per_hour", type=float, default=2.73 / 2.1, help="yuan; its README: 2.73 for 2.1 h")
    parser.add_argument("--token_ratio", type=float, default=0.45, help="tokens that our pretraining needs / theirs")
    parser.add_argument(
        "--positions_per_second", type=float, default=0.0, help="of ours, measured (0: as fast as theirs)"
    )
    return parser.parse_args()


def fill(claim: Claim) -> float:
    """Share of its positions that hold text; the rest is padding."""
    tokens = claim.file_bytes / claim.rows / BYTES_PER_CHARACTER / CHARACTERS_PER_TOKEN
    return min(1.0, tokens / LENGTH)


def speed(claim: Claim) -> float:
    """Its positions per second."""
    return claim.rows * LENGTH / claim.hours / 3600


def table(price: float, ratio: float, ours: float) -> list[str]:
    """The lines. price: of an hour; ratio: of the tokens in pretraining; ours: positions per second, 0: theirs."""
    claims = (PRETRAIN, SFT)
    flops = step_flops(ModelConfig.preset("small"), 1, LENGTH)
    row = lambda name, *cells: f"| {name} | " + " | ".join(cells) + " |"
    hours = lambda values: [f"{value:.2f} h" for value in values]

    def summed(name: str, values: list[float]) -> str:
        return row(name, *hours(values), f"{sum(values):.2f} h, {price * sum(values):.2f} yuan")

    packed = [claim.hours * fill(claim) * (speed(claim) / ours if ours else 1) for claim in claims]
    return [
        row("", *(claim.name for claim in claims), "both"),
        "|---|---|---|---|",
        summed("MiniMind's README", [claim.hours for claim in claims]),
        row("rows of 512", *(f"{claim.rows / 1e6:.2f}M" for claim in claims), ""),
        row("positions per second", *(f"{speed(claim) / 1e3:,.0f}k" for claim in claims), ""),
        row("share of 71 TFLOP/s", *(f"{speed(claim) * flops / PEAK:.0%}" for claim in claims), ""),
        row("positions that hold text", *(f"{fill(claim):.0%}" for claim in claims), ""),
        summed("ours, without padding", packed),
        summed(f"ours, and {ratio:.0%} of the tokens in pretraining", [packed[0] * ratio, packed[1]]),
    ]


def main():
    args = arguments()
    print("\n".join(table(args.price_per_hour, args.token_ratio, args.positions_per_second)))


if __name__ == "__main__":
    main()
