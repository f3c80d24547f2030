"""Pretraining: a model learns to continue text. Writes out/pretrain_<hidden>[_moe].pth.

    python trainer/train_pretrain.py                                       # the built-in tiny world: minutes on a CPU
    python trainer/train_pretrain.py --data_path dataset/pretrain_hq.jsonl --preset small
    torchrun --nproc_per_node 2 trainer/train_pretrain.py --preset base

Data: {"text": ...} rows in .jsonl, or plain .txt files. The architecture is stated here, once; later stages read it
from the weights.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, make_dataclass
from typing import ClassVar

from common.console import run
from common.options import parse
from model.config import architecture_options
from trainer.stage import StageConfig

# hidden_size and num_hidden_layers are options of every stage already: there they choose among weights
ArchitectureOptions = make_dataclass(
    "ArchitectureOptions",
    [item for item in architecture_options() if item[0] not in StageConfig.__dataclass_fields__],
    bases=(StageConfig,),
    namespace={"__doc__": "Architecture of a fresh model"},
    frozen=True,
)


@dataclass(frozen=True)
class PretrainConfig(ArchitectureOptions):
    """Options of pretraining"""

    save_weight: str = "pretrain"
    rates: ClassVar[dict[str, float]] = {"modern": 2e-3, "classic": 5e-4}

    def problems(self) -> list[str]:
        found = super().problems()
        if self.on_long != "truncate":
            what = "pretraining cuts a stream into rows, nothing is too long; leave it out"
            found.append(f"--on_long {self.on_long}: {what}")
        return found


def main():
    config = parse(PretrainConfig, description=__doc__)

    from dataset.tokens.examples import PretrainDataset
    from trainer.losses.next_token import NextToken
    from trainer.run_stage import run_stage

    run_stage("pretrain", config, NextToken(), PretrainDataset, kind="pretrain", weights=None, packing=False)


if __name__ == "__main__":
    run(main)
