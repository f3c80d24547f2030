"""How true --plan is: the plan of a run, then that run itself. Memory should agree within 10 %, time within 15 %.

python benchmarks/plan.py                                    # nano pretraining and SFT on the tiny world, 60 steps
python benchmarks/plan.py --preset small --steps 40 --compile on
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import machine, show
from common.files import ROOT

MEMORY, TIME = 0.10, 0.15


def train(stage: str, *flags: str) -> str:
    command = [sys.executable, str(ROOT / f"trainer/train_{stage}.py"), *flags]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout


def planned(text: str) -> tuple[float, float]:
    """GiB and seconds out of what --plan prints."""
    memory = float(re.search(r"memory +([\d.]+) GiB", text)[1])
    days, hours, minutes, seconds = re.search(r"time +(?:(\d+) days?, )?(\d+):(\d+):(\d+)", text).groups()
    return memory, ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + int(seconds)


def real(save_dir: Path) -> tuple[float, float]:
    (run,) = (save_dir / "runs").iterdir()
    summary = json.loads((run / "run.json").read_text(encoding="utf-8"))["summary"]
    return summary["memory_gib"], summary["seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", default="60")
    parser.add_argument("--batch_size", default="16")
    parser.add_argument("--max_seq_len", default="256")
    parser.add_argument("--compile", default="auto")
    args = parser.parse_args()

    missed = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "pretrain")
        print(f"{machine()}; {args.preset}, {args.steps} steps of {args.batch_size}\n")
        for stage, own in (("pretrain", ["--preset", args.preset]), ("full_sft", ["--from_weight", str(weights)])):
            flags = [f"--{name}={getattr(args, name)}" for name in ("batch_size", "max_seq_len", "compile")]
            flags += [
                f"--max_steps={args.steps}",
                f"--save_dir={Path(folder, stage)}",
                "--save_interval=20",
                "--val_fraction=0.02",
                *own,
            ]
            expected = planned(train(stage, *flags, "--plan"))
            train(stage, *flags)
            for what, limit, plan, fact in zip(("GiB", "s"), (MEMORY, TIME), expected, real(Path(folder, stage))):
                off = plan / fact - 1
                show(f"{stage}, planned", plan, what)
                show(f"{stage}, real", fact, what)
                print(f"{stage:9} planned {plan:7.2f} {what:3}  real {fact:7.2f} {what:3}  {off:+.0%}", flush=True)
                missed += [f"{stage} {what}"] * (abs(off) > limit)
    if missed:
        sys.exit(f"further off than {MEMORY:.0%} (memory) or {TIME:.0%} (time): {', '.join(missed)}")


if __name__ == "__main__":
    main()
