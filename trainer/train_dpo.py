"""Preferences: of two answers to a prompt, one becomes more likely than the other. Writes out/rlhf_<hidden>[_moe].pth.

    python trainer/train_dpo.py                                          # on top of out/full_sft_*.pth
    python trainer/train_dpo.py --data_path my.jsonl --val_fraction 0.1  # with accuracy and margin of held-out pairs
    python trainer/train_dpo.py --lora_rank 8 --learning_rate 1e-4       # an adapter only: out/lora/rlhf_<hidden>.pth
    torchrun --nproc_per_node 2 trainer/train_dpo.py --loss_type ipo --beta 0.1

Data: {"chosen": [messages], "rejected": [messages]} rows, the same up to the answer; or "prompt", "chosen", "rejected"
as text. What the losses are and what the figures mean: docs/preferences.md.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from common.console import run
from common.options import option, parse
from common.values import LONGEST
from trainer.losses.pair_losses import LOSSES, OWN_OPTIONS
from trainer.stage import StageConfig

BETA_HELP = (
    "pull to the reference; in losses without one the scale of rewards, in orpo the weight of the odds "
    f"({', '.join(f'{name} {loss.beta:g}' for name, loss in LOSSES.items())})"
)


def having(option: str) -> str:
    """The losses that have an option, in words."""
    return ", ".join(name for name, loss in LOSSES.items() if option in loss.options)


@dataclass(frozen=True)
class DPOConfig(StageConfig):
    """Options of preference tuning"""

    save_weight: str = "rlhf"
    epochs: int = 2
    batch_size: int = 4
    max_seq_len: int = 1024
    rates: ClassVar[dict[str, float]] = {"classic": 5e-6}
    loss_type: str = option("sigmoid", "sigmoid is DPO; docs/preferences.md has them all", choices=tuple(LOSSES))
    beta: float | None = option(None, BETA_HELP, aliases=("dpo_beta",), within="(0, inf)")
    label_smoothing: float = option(
        0.0, f"share of pairs that are labelled wrongly ({having('label_smoothing')})", within="[0, 0.5)"
    )
    rpo_alpha: float = option(
        0.0, f"weight of keeping the chosen answer likely ({having('rpo_alpha')})", within="[0, inf)"
    )
    simpo_gamma: float = option(0.5, f"margin to reach ({having('simpo_gamma')})", within="[0, inf)")
    cpo_alpha: float = option(
        1.0, f"weight of the chosen answer's likelihood ({having('cpo_alpha')})", within="[0, inf)"
    )
    max_prompt_length: int = option(0, "tokens of a prompt, cut from the left (0: what fits)", within=f"[0, {LONGEST}]")

    def __post_init__(self):
        super().__post_init__()
        if self.beta is None and self.loss_type in LOSSES:
            object.__setattr__(self, "beta", LOSSES[self.loss_type].beta)

    def problems(self) -> list[str]:
        found = super().problems()
        for name in OWN_OPTIONS if self.loss_type in LOSSES else ():
            if getattr(self, name) != getattr(DPOConfig, name) and name not in LOSSES[self.loss_type].options:
                owners = f"belongs to --loss_type {having(name)}, not to {self.loss_type}"
                found.append(f"--{name} {getattr(self, name):g}: {owners}")
        return found


def main():
    config = parse(DPOConfig, description=__doc__)

    from dataset.batches.preference import PairLoader, PreferenceDataset
    from trainer.losses.preference import Preference, add_reference
    from trainer.run_stage import start_stage

    loss = LOSSES[config.loss_type]
    options = dict(on_long=config.on_long, max_prompt_length=config.max_prompt_length)
    with start_stage("dpo", config, PreferenceDataset, kind="dpo", weights="full_sft", **options) as stage:
        prepare = None
        if loss.reference and not config.trains_adapter:  # an adapter's reference is the model without it
            about = dict(model=stage.model, backend=stage.backend, config=config, weights=stage.parent.hash)
            prepare = partial(add_reference, **about)
        own = {name: getattr(config, name) for name in loss.options}
        stage.train(Preference(config.loss_type, config.beta, **own), loader=PairLoader, prepare=prepare)


if __name__ == "__main__":
    run(main)
