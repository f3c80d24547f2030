"""The gradient of two processes, for tests/trainer/test_engine.py: torchrun tests/helpers/gradients_run.py FOLDER"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.options import parse
from tests.helpers.runs import FLAGS, first_gradients, sft_engine
from trainer.loop.processes import start
from trainer.train_full_sft import SFTConfig

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with start(parse(SFTConfig, FLAGS)) as backend:
        gradients = first_gradients(sft_engine(folder, 4, 2, backend))
        if backend.main:
            torch.save(gradients, folder / "two_ranks.pth")
