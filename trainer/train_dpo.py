"""Preferences: of two answers to a prompt, one becomes more likely than the other. Writes out/rlhf_<hidden>[_moe].pth.

    python trainer/train_dpo.py                                          # on top of out/full_sft_*.pth
    python trainer/train_dpo.py --data_path my.jsonl --val_fraction 0.1  # with accuracy and margin of held-out pairs
    torchrun --nproc_per_node 2 trainer/train_dpo.py --loss_type ipo --beta 0.1

Data: {"chosen": [messages], "rejected": [messages]} rows, the same up to the answer; or "prompt", "chosen", "rejected"
as text. What the losses are and what the figures mean: docs/preferences.md.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import ClassVar

from trainer.config import StageConfig, option, parse, run


@dataclass(frozen=True)
class DPOConfig(StageConfig):
    """Options of preference tuning"""

    elsewhere: ClassVar[dict[str, str]] = {
        k: v for k, v in StageConfig.elsewhere.items() if k not in ("beta", "dpo_beta", "max_prompt_length")
    }

    save_weight: str = "rlhf"
    epochs: int = 2
    batch_size: int = 4
    max_seq_len: int = 1024
    learning_rate: float = 5e-6
    loss_type: str = option("sigmoid", "sigmoid is DPO", choices=("sigmoid", "ipo", "hinge", "simpo", "orpo"))
    beta: float = option(0.1, "pull to the reference; in simpo scale of rewards (its paper: 2), in orpo weight of odds",
                         aliases=("dpo_beta",), within="(0, inf)")  # fmt: skip
    label_smoothing: float = option(0.0, "share of pairs that are labelled wrongly (sigmoid, simpo)", within="[0, 0.5)")
    simpo_gamma: float = option(0.5, "margin that simpo asks for", within="[0, inf)")
    max_prompt_length: int = option(0, "tokens of a prompt, cut from the left (0: what fits)", within="[0, inf)")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            found.append(f"--label_smoothing {self.label_smoothing:g}: --loss_type {self.loss_type} has none")
        return found


def main():
    config = parse(DPOConfig, description=__doc__)

    import torch

    from dataset.preference import PairLoader, PreferenceDataset
    from model.device import pick_dtype
    from trainer.backend import start
    from trainer.engine import Engine, Job
    from trainer.preference import WITHOUT_REFERENCE, Preference, add_reference
    from trainer.prepare import open_data, open_weights

    torch.manual_seed(config.seed)
    parent, tokenizer, origin = open_weights(config, "full_sft")
    options = dict(on_long=config.on_long, max_prompt_length=config.max_prompt_length)
    data = open_data(PreferenceDataset, config, "dpo", tokenizer, **options)
    with start(config) as backend:
        model, notes = parent.build().to(backend.device), [origin]
        model.compute_dtype, _ = pick_dtype(config.dtype, backend.device)
        if config.loss_type not in WITHOUT_REFERENCE:
            sets = [dataset for dataset in (data.train, data.val) if dataset is not None]
            notes.append(add_reference(sets, model, backend, config, f"{parent.hash} {model.compute_dtype}"))
        Engine(
            Job(
                stage="dpo",
                config=config,
                model=model,
                objective=Preference(config.loss_type, config.beta, config.label_smoothing, config.simpo_gamma),
                tokenizer=tokenizer,
                data=data,
                packing=True,
                parent=parent,
                notes=notes,
                loader=PairLoader,
            ),
            backend,
        ).run()


if __name__ == "__main__":
    run(main)
