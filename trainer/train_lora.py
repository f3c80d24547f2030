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

from dataclasses import dataclass

from common.console import run
from common.options import parse
from trainer.stage import StageConfig


@dataclass(frozen=True)
class LoRAConfig(StageConfig):
    """Options of training an adapter"""

    save_weight: str = "lora_identity"
    use_lora: bool | None = True
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def problems(self) -> list[str]:
        without = [] if self.trains_adapter else ["--use_lora false: tuning all weights is trainer/train_full_sft.py"]
        return super().problems() + without


def main():
    config = parse(LoRAConfig, description=__doc__)

    from dataset.tokens.examples import SFTDataset
    from trainer.losses.next_token import NextToken
    from trainer.run_stage import start_stage

    name = config.save_weight  # of the adapter, of the stage, and of the data if no other is named
    with start_stage(name, config, SFTDataset, kind=name, weights="full_sft", on_long=config.on_long) as stage:
        if config.data_path and name == LoRAConfig.save_weight:
            stage.notes.append(f"note: this adapter is called {name}; --lora_name gives it another name")
        stage.train(NextToken())


if __name__ == "__main__":
    run(main)
