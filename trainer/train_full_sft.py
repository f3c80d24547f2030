"""Supervised fine-tuning of all weights: a pretrained model learns to answer. Writes out/full_sft_<hidden>[_moe].pth.

    python trainer/train_full_sft.py                                       # on top of out/pretrain_*.pth
    python trainer/train_full_sft.py --data_path my.jsonl --show_labels 3  # see which tokens are trained on
    torchrun --nproc_per_node 2 trainer/train_full_sft.py --from_weight pretrain

Data: {"conversations": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]} rows, or any other
layout of docs/data.md.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import ClassVar

from common.console import run
from common.options import parse
from trainer.stage import StageConfig


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    """Options of full fine-tuning"""

    save_weight: str = "full_sft"
    epochs: int = 2
    batch_size: int = 16
    rates: ClassVar[dict[str, float]] = {"classic": 5e-5, "modern": 5e-4}


def main():
    config = parse(SFTConfig, description=__doc__)

    from dataset.tokens.examples import SFTDataset
    from trainer.losses.next_token import NextToken
    from trainer.run_stage import run_stage

    run_stage("full_sft", config, NextToken(), SFTDataset, kind="sft", weights="pretrain", on_long=config.on_long)


if __name__ == "__main__":
    run(main)
