"""LoRA: a model learns something new through small matrices beside its frozen weights. Writes only these:
out/lora/<lora_name>_<hidden>[_moe].pth.

    python trainer/train_lora.py                                            # who it is, on top of out/full_sft_*.pth
    python trainer/train_lora.py --lora_name lora_medical --data_path dataset/lora_medical.jsonl
    python trainer/train_lora.py --from_weight pretrain --lora_rank 16 --lora_targets attention --save_peft
    python eval_model.py --lora_name lora_identity                          # its base is found by itself

Data: chats, as in full fine-tuning. Linear layers can be adapted, experts (stacked parameters) and routers cannot.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
from dataclasses import dataclass
from typing import ClassVar

from common.console import run
from common.options import option, parse
from trainer.stage import StageConfig

IDENTITY = "lora_identity"  # what it learns without data of the user's: who it is


@dataclass(frozen=True)
class LoRAConfig(StageConfig):
    """Options of training an adapter"""

    save_weight: str = option(
        "", f"name of the adapter (default: lora_ and the name of the data file; without data: {IDENTITY})"
    )
    use_lora: bool | None = True
    epochs: int = 3
    batch_size: int = 16
    rates: ClassVar[dict[str, float]] = {"classic": 1e-3}
    weight_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not self.save_weight:  # and --lora_name is not given either
            object.__setattr__(self, "save_weight", name_after(self.data_path[0]) if self.data_path else IDENTITY)

    def problems(self) -> list[str]:
        without = [] if self.trains_adapter else ["--use_lora false: tuning all weights is trainer/train_full_sft.py"]
        return super().problems() + without


def name_after(data: str) -> str:
    """The name of an adapter that is trained on this file: chats.jsonl:3 -> lora_chats."""
    stem = Path(re.sub(r":[\d.]+$", "", data)).stem
    return stem if stem.startswith("lora_") else f"lora_{stem}"


def main():
    config = parse(LoRAConfig, description=__doc__)

    from dataset.tokens.examples import SFTDataset
    from trainer.losses.next_token import NextToken
    from trainer.run_stage import start_stage

    name = config.save_weight  # of the adapter, of the stage, and of the data if no other is named
    with start_stage(name, config, SFTDataset, kind=name, weights="full_sft", on_long=config.on_long) as stage:
        if config.data_path and name == name_after(config.data_path[0]):
            stage.notes.append(f"note: the adapter is called {name}, after its data; --lora_name gives it another name")
        stage.train(NextToken())


if __name__ == "__main__":
    run(main)
