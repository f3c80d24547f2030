"""What an adapter learns beside 8 and 4 bits, compared with bf16: the loss on held-out chats after 100 steps.

    python benchmarks/real_data/low_bits.py --weight out/full_sft_512.pth --data_path ../shared/data/sft.jsonl

Every 50th row is held out. All runs see the same rows in the same order. Exits with status 1 where the loss beside 4
bits is not within 2 % of that beside bf16. The weights have to be trained: random ones lose nothing by rounding.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.real_data.common import hold_out, stage
from common.files import ROOT
from model.checkpoint import find_weights

MODES = {"bf16": (), "8 bits": ("--load_in_8bit",), "4 bits": ("--load_in_4bit",)}
MOST = 0.02  # that 4 bits may cost


def held_out_losses(folder: Path) -> list[float]:
    """In the order of steps."""
    (log,) = folder.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [row["val_loss"] for row in rows if "val_loss" in row]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weight", default="full_sft", help="a name in out/, a file or a directory")
    parser.add_argument("--tokenizer_path", help="of weights that do not know theirs")
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, held_out = hold_out(args.data_path, folder, lambda i: i % 50 == 0)
        flags = ["--from_weight", find_weights(args.weight, ROOT / "out").resolve(), "--data_path", train]
        flags += ["--val_path", held_out, "--cache_dir", folder / "cache", "--max_seq_len", args.length]
        flags += ["--batch_size", args.batch_size, "--learning_rate", args.learning_rate, "--dtype", "bfloat16"]
        flags += ["--max_steps", args.steps, "--val_interval", args.steps, "--lora_rank", 8]
        flags += ["--on_bad_row", "skip"]
        flags += ["--tokenizer_path", args.tokenizer_path] if args.tokenizer_path else []
        losses = {}
        for mode, more in MODES.items():
            out = folder / mode.replace(" ", "_")
            stage("lora", *flags, "--save_dir", out, *more)
            losses[mode] = held_out_losses(out)[-1]
    print(f"\nheld-out loss after {args.steps} steps")
    for mode, loss in losses.items():
        print(f"{mode:>7} {loss:.4f} ({loss / losses['bf16'] - 1:+.2%})")
    sys.exit(0 if losses["4 bits"] <= (1 + MOST) * losses["bf16"] else 1)


if __name__ == "__main__":
    main()
