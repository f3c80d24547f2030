"""What a person waits for before anything happens: `--help`, against `import torch` alone.

python benchmarks/startup.py
"""

import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import machine, seconds, show

ROOT = Path(__file__).resolve().parents[1]
SIDES = {
    "import torch": ["-c", "import torch"],
    "train_pretrain.py --help": [str(ROOT / "trainer/train_pretrain.py"), "--help"],
    "eval_model.py --help": [str(ROOT / "eval_model.py"), "--help"],
}


def main():
    times = {name: [] for name in SIDES}
    for _ in range(7):
        for name, command in SIDES.items():
            run = lambda: subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)  # noqa: B023
            times[name].append(seconds(run))
    print(machine())
    for name, values in times.items():
        show(name, values[1:], "s")  # the first one fills the disk's cache


if __name__ == "__main__":
    main()
