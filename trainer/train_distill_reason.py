"""Reasoning: a model learns from a larger one's thoughts to think before it answers. Writes
out/reason_<hidden>[_moe].pth.

    python trainer/train_distill_reason.py                                   # on top of out/full_sft_*.pth
    python trainer/train_distill_reason.py --data_path r1.jsonl chats.jsonl:0.2 --show_labels 3
    torchrun --nproc_per_node 2 trainer/train_distill_reason.py --tag_weight 1

Data: chats whose answers are "<think>…</think>" and then the answer, which "<answer>…</answer>" may enclose, or which
have "reasoning_content"; among them any others, so that it still talks. See docs/reasoning_and_distillation.md.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import ClassVar

from common.console import UserError, run
from common.options import option, parse
from trainer.stage import StageConfig


@dataclass(frozen=True)
class ReasonConfig(StageConfig):
    """Options of reasoning"""

    save_weight: str = "reason"
    epochs: int = 1
    batch_size: int = 8
    max_seq_len: int = 1024
    rates: ClassVar[dict[str, float]] = {"classic": 1e-4}
    tag_weight: float = option(
        10.0, "how much <think> </think> <answer> </answer> count, words count 1", within="(0, inf)"
    )


def main():
    config = parse(ReasonConfig, description=__doc__)

    from dataset.tokens.reason import ReasonDataset
    from trainer.losses.next_token import Weighted
    from trainer.run_stage import start_stage

    options = dict(on_long=config.on_long, tag_weight=config.tag_weight)
    with start_stage("reason", config, ReasonDataset, kind="reason", weights="full_sft", **options) as stage:
        thoughts, seen = stage.data.train.thoughts()
        if not thoughts:
            raise UserError(
                f"{stage.data.train.source(0)}: none of {seen:,} examples has a <think> block or reasoning_content; "
                "trainer/train_full_sft.py is for plain chats"
            )
        stage.notes.append(f"thoughts: in {thoughts:,} of {seen:,} examples looked at")
        stage.train(Weighted())


if __name__ == "__main__":
    run(main)
