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


def main():
    config = parse(PretrainConfig, description=__doc__)

    import torch

    from dataset.tokens.examples import PretrainDataset
    from model.transformer import CausalLM
    from tokenizer.text import Tokenizer
    from trainer.inputs import architecture, open_data, open_weights
    from trainer.loop.engine import Engine, Job
    from trainer.loop.processes import start
    from trainer.losses.base import NextToken

    torch.manual_seed(config.seed)
    parent, origin = None, ""
    if config.from_weight:
        parent, tokenizer, origin = open_weights(config, config.from_weight)
        model = parent.build()
    else:
        tokenizer = Tokenizer.load(config.tokenizer_path)
    data = open_data(PretrainDataset, config, "pretrain", tokenizer)
    if not parent:
        preset = config.preset or ("nano" if data.builtin else "small")
        model = CausalLM(architecture(config, tokenizer, preset))
    with start(config) as backend:
        Engine(
            Job(
                stage="pretrain",
                config=config,
                model=model,
                objective=NextToken(),
                tokenizer=tokenizer,
                data=data,
                packing=False,
                parent=parent,
                notes=[origin],
            ),
            backend,
        ).run()


if __name__ == "__main__":
    run(main)
