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
from common.options import option, parse
from trainer.stage import StageConfig


@dataclass(frozen=True)
class LoRAConfig(StageConfig):
    """Options of LoRA"""

    save_weight: str = option("lora_identity", "name of the adapter", aliases=("lora_name",))
    lora_rank: int = option(8, "inner size of the matrices", aliases=("lora_r", "r"), within="[1, inf)")
    lora_alpha: float = option(16.0, "what they add is multiplied by alpha / rank", within="(0, inf)")
    lora_dropout: float = option(0.0, "share of their inputs left out at random", within="[0, 1)")
    lora_targets: tuple[str, ...] = option(
        ("all",), "layers: all, attention, mlp, or names such as q_proj,v_proj", aliases=("target_modules",)
    )
    use_rslora: bool = option(False, "alpha / sqrt(rank) instead, for high ranks")
    load_in_4bit: bool = option(False, "not built yet: train beside weights of 4 bits", aliases=("use_4bit",))
    load_in_8bit: bool = option(False, "not built yet: the same with 8 bits", aliases=("use_8bit",))
    use_lora: bool = option(True, "said in files written for other projects")
    save_peft: bool = option(False, "write a directory that peft reads as well")
    merge_lora: bool = option(False, "write the full weights with the adapter in them as well: <lora_name>_merged")
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def problems(self):
        without = [] if self.use_lora else ["--use_lora false: tuning all weights is trainer/train_full_sft.py"]
        bits = [
            f"--{name}: training beside quantised weights is not built yet; leave it out, and see with --plan what "
            "fits (--batch_size, --activation_checkpointing)"
            for name in ("load_in_4bit", "load_in_8bit")
            if getattr(self, name)
        ]
        found = [line.replace("--save_weight", "--lora_name") for line in super().problems()]
        return found + without + bits


def main():
    config = parse(LoRAConfig, description=__doc__)

    import torch

    from dataset.tokens.examples import SFTDataset
    from model.checkpoint import weights_name
    from model.lora import LoRASettings, add_lora, freeze
    from trainer.inputs import open_data, open_weights
    from trainer.loop.engine import Engine, Job
    from trainer.loop.processes import start
    from trainer.losses.next_token import NextToken
    from trainer.run.artifacts import AdapterOnly

    torch.manual_seed(config.seed)
    parent, tokenizer, origin = open_weights(config, "full_sft")
    settings = LoRASettings(
        config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets, config.use_rslora
    )
    model = parent.build()
    freeze(model)
    layers = add_lora(model, settings)
    merged = weights_name(f"{config.save_weight}_merged", model.config) if config.merge_lora else ""
    named = config.save_weight != LoRAConfig.save_weight or not config.data_path
    called = [] if named else [f"note: this adapter is called {config.save_weight}; --lora_name gives it another name"]
    data = open_data(SFTDataset, config, config.save_weight, tokenizer, on_long=config.on_long)
    with start(config) as backend:
        torch.manual_seed(config.seed + backend.rank)  # dropout: other samples on every rank
        Engine(
            Job(
                stage=config.save_weight,
                config=config,
                model=model,
                objective=NextToken(),
                tokenizer=tokenizer,
                data=data,
                packing=True,
                parent=parent,
                notes=[*called, origin, f"adapters beside {len(layers)} layers: {', '.join(config.lora_targets)}"],
                output=AdapterOnly(settings, parent, config.save_peft, merged),
            ),
            backend,
        ).run()


if __name__ == "__main__":
    run(main)
