"""How much memory a training takes beyond what torch and our code take: run as a process of its own.

python tests/helpers/memory_run.py FLAGS of trainer/train_full_sft.py -> the last line: bytes
"""

import resource
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from trainer import train_full_sft

UNIT = 1 if sys.platform == "darwin" else 1024


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


torch.nn.Linear(64, 64)(torch.zeros(64, 64)).sum().backward()  # what the first use of torch loads
before = peak()
train_full_sft.main()
print(peak() - before)
