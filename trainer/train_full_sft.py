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

from common.console import run
from common.options import parse
from trainer.stage import StageConfig


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    """Options of full fine-tuning"""

    save_weight: str = "full_sft"
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 5e-5


def main():
    config = parse(SFTConfig, description=__doc__)

    import torch

    from dataset.tokens.examples import SFTDataset
    from trainer.inputs import open_data, open_weights
    from trainer.loop.engine import Engine, Job
    from trainer.loop.processes import start
    from trainer.losses.next_token import NextToken

    torch.manual_seed(config.seed)
    parent, tokenizer, origin = open_weights(config, "pretrain")
    data = open_data(SFTDataset, config, "sft", tokenizer, on_long=config.on_long)
    with start(config) as backend:
        Engine(
            Job(
                stage="full_sft",
                config=config,
                model=parent.build(),
                objective=NextToken(),
                tokenizer=tokenizer,
                data=data,
                packing=True,
                parent=parent,
                notes=[origin],
            ),
            backend,
        ).run()


if __name__ == "__main__":
    run(main)
