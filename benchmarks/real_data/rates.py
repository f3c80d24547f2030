"""Which learning rates the later stages need: full SFT, LoRA and DPO with several rates on real text, held-out loss.

    python benchmarks/real_data/rates.py --data_dir ../shared/data                  # nano, all of it: hours on 2 cores
    python benchmarks/real_data/rates.py --data_dir ../shared/data --stages full_sft --steps 100

Pretrains a model, tunes it with every rate and recipe, and starts LoRA and DPO from the best of these. Each run
validates at its end, on 3 % of the rows (of the pairs 20 %). What exists in --work_dir is not run again, so it can be
stopped.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.real_data.common import stage
from common.files import ROOT
from model.checkpoint import find_weights
from trainer.run.logger import read_metrics

RATES = {  # stage -> recipe -> rates
    "full_sft": {"classic": ("5e-5", "5e-4", "2e-3"), "modern": ("1e-4", "5e-4", "2e-3")},
    "lora": {"classic": ("1e-4", "3e-4", "1e-3", "3e-3")},
    "dpo": {"classic": ("5e-7", "5e-6", "2e-5", "5e-5")},
}
FILES = {"full_sft": "sft.jsonl", "lora": "lora_medical.jsonl", "dpo": "dpo.jsonl"}
OWN = {
    "full_sft": ["--batch_size", 16],
    "lora": ["--batch_size", 16],
    "dpo": ["--batch_size", 8, "--max_seq_len", 1024],
}


def validation(folder: Path, name: str) -> dict[str, float]:
    """The last validation of a run of this name; {} if there is none."""
    found = {}
    for path in sorted(folder.glob(f"runs/{name}_*/metrics.jsonl")):
        for row in read_metrics(path):
            found |= {key: value for key, value in row.items() if key.startswith("val_")}
    return found


def try_rates(name: str, parent: Path, common: list, args: argparse.Namespace) -> dict[tuple[str, str], dict]:
    """{(recipe, rate): what the validation at the end found}"""
    results = {}
    for recipe, rates in RATES[name].items():
        for rate in rates:
            run = f"{name}_{recipe}_{rate}"
            if not validation(args.work_dir, run):
                flags = ["--from_weight", parent, "--recipe", recipe, "--learning_rate", rate, "--save_weight", run]
                held_out = 0.2 if name == "dpo" else 0.03
                flags += ["--data_path", args.data_dir / FILES[name], "--val_fraction", held_out, *OWN[name]]
                stage(name, *common, *flags, "--max_steps", args.steps)
            results[recipe, rate] = validation(args.work_dir, run)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "out" / "rates")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--stages", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--pretrain_steps", type=int, default=1500, help="of 8 x 256 tokens")
    parser.add_argument("--steps", type=int, default=250, help="of each trial")
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()

    args.work_dir = args.work_dir.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    common = ["--save_dir", args.work_dir, "--cache_dir", args.work_dir / "cache", "--max_seq_len", args.length]
    common += ["--on_bad_row", "skip"]
    if not list(args.work_dir.glob("pretrain_*.pth")):
        text = ["--data_path", args.data_dir / "pretrain.jsonl", "--preset", args.preset, "--batch_size", 8]
        stage("pretrain", *common, *text, "--max_seq_len", 256, "--epochs", 99, "--max_steps", args.pretrain_steps)
    parent = find_weights("pretrain", args.work_dir)
    tables = {}
    for name in RATES:
        if name not in args.stages:
            continue
        tables[name] = try_rates(name, parent, common, args)
        if name == "full_sft":
            recipe, rate = min(tables[name], key=lambda key: tables[name][key]["val_loss"])
            parent = find_weights(f"full_sft_{recipe}_{rate}", args.work_dir)
    for name, results in tables.items():
        print(f"\n{name}, {args.steps} steps")
        for (recipe, rate), found in results.items():
            more = f"  accuracy {found['val_accuracy']:.3f}" if "val_accuracy" in found else ""
            print(f"  {recipe:8} {rate:>7}  held-out loss {found['val_loss']:.4f}{more}")


if __name__ == "__main__":
    main()
