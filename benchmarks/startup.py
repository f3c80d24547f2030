"""What a person waits for: `--help`, against `import torch` alone, and the first optimiser step of a training.

    python benchmarks/startup.py

The trainings are `nano` on the tiny world, with the tokens cached already and `--compile off`. Their time is from the
command to the line of the first step. The first round fills the caches and does not count.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import machine, seconds, show

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--compile off --max_steps 2 --log_interval 1 --batch_size 8 --max_seq_len 256".split()


def until_first_step(script: str, *flags: str) -> float:
    """Seconds from the command to the line of its first optimiser step."""
    begin = time.perf_counter()
    command = [sys.executable, "-u", str(ROOT / script), *FLAGS, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 1/"):
                waited = time.perf_counter() - begin
                process.communicate()  # it writes its weights, which the next stage starts from
                return waited
    sys.exit("".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        here = ["--save_dir", folder]
        call = lambda *words: (
            lambda: seconds(lambda: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL))
        )
        sides = {
            "import torch": call("-c", "import torch"),
            "train_pretrain.py --help": call(str(ROOT / "trainer/train_pretrain.py"), "--help"),
            "eval_model.py --help": call(str(ROOT / "eval_model.py"), "--help"),
            "train_pretrain.py: first step": lambda: until_first_step(
                "trainer/train_pretrain.py", "--preset", "nano", *here
            ),
            "train_full_sft.py: first step": lambda: until_first_step("trainer/train_full_sft.py", *here),
        }
        times = {name: [] for name in sides}
        for _ in range(rounds + 1):
            for name, measure in sides.items():
                times[name].append(measure())
    print(machine())
    for name, values in times.items():
        show(name, values[1:], "s")  # the first one fills the disk's cache


if __name__ == "__main__":
    main()
