"""20,000 steps of a very small model, with saves, validation and logs: does the memory grow, do files stay open?

    python benchmarks/faults/memory.py                    # some minutes
    python benchmarks/faults/memory.py --steps 2000

Printed are the slope of a line through the resident memory after every 100 steps (but for the first tenth, where caches
fill), and the least and greatest number of open files.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from tests.helpers.rows import write_pretrain
from tests.helpers.runs import run_stage
from trainer.loop import engine

LIMIT = 1.0  # MB per 1,000 steps


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    update, seen, files = engine.Engine.train_step, [], []

    def watched(self, *arguments):
        if self.step % 100 == 0:
            seen.append((self.step, resident()))
            files.append(len(os.listdir("/proc/self/fd")))
        return update(self, *arguments)

    engine.Engine.train_step = watched
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data = write_pretrain(Path(folder, "text.jsonl"))
        run_stage(
            "pretrain",
            f"--data_path={data}",
            f"--save_dir={folder}",
            f"--max_steps={steps}",
            "--batch_size=2",
            "--hidden_size=8",
            "--max_seq_len=16",
            f"--save_interval={steps // 20}",
            "--log_interval=50",
            "--val_fraction=0.1",
            "--learning_rate=1e-4",
        )
    rows = np.array(seen[len(seen) // 10 :])
    slope = np.polyfit(rows[:, 0] / 1000, rows[:, 1], 1)[0]
    settled = files[len(files) // 10 :]
    print(
        f"{steps:,} steps: memory {rows[0, 1]:.1f} -> {rows[-1, 1]:.1f} MB, {slope:+.3f} MB per 1,000 steps; "
        f"open files {min(settled)} .. {max(settled)}"
    )
    return int(slope > LIMIT or max(settled) > min(settled))


if __name__ == "__main__":
    sys.exit(main())
