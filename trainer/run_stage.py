"""Runs a stage: everything that all trainings do the same way, in one place.

    run_stage("full_sft", config, NextToken(), SFTDataset, kind="sft", weights="pretrain")

or, for a stage that needs its model or its data before it can train:

    with start_stage("dpo", config, PreferenceDataset, kind="dpo", weights="full_sft") as stage:
        prepare = partial(add_reference, model=stage.model, backend=stage.backend, config=config, weights=...)
        stage.train(Preference("sigmoid"), loader=PairLoader, prepare=prepare)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from common.console import UserError
from dataset.tokens.examples import TokenDataset
from model.checkpoint import Checkpoint, weights_name
from model.lora import LoRASettings, add_lora, find_targets, freeze, linear_layers
from model.quant import bytes_per_parameter
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.inputs import Data, check_positions, open_data, open_model
from trainer.loop.backend import Backend
from trainer.loop.engine import Engine, Job
from trainer.loop.interrupts import explained
from trainer.loop.processes import start
from trainer.losses.base import Objective
from trainer.run.artifacts import AdapterOnly, Weights
from trainer.stage import StageConfig


@dataclass
class Stage:
    """A stage that is ready to train."""

    name: str
    config: StageConfig
    model: CausalLM
    tokenizer: Tokenizer
    data: Data
    backend: Backend
    output: Weights
    notes: list[str]  # lines printed when the run starts
    parent: Checkpoint | None  # the weights it starts from; None: a fresh model

    def train(self, objective: Objective, *, packing: bool = True, **others) -> Path:
        """Trains to the end -> the file that was written. others: further fields of Job, such as `loader`."""
        job = Job(
            stage=self.name,
            config=self.config,
            model=self.model,
            objective=objective,
            tokenizer=self.tokenizer,
            data=self.data,
            packing=packing,
            parent=self.parent,
            notes=self.notes,
            output=self.output,
            **others,
        )
        return Engine(job, self.backend).run()


@contextmanager
def start_stage(
    name: str,
    config: StageConfig,
    dataset: type[TokenDataset],
    *,
    kind: str,
    weights: str | None,
    tokenizer: Tokenizer | None = None,
    **options,
) -> Iterator[Stage]:
    """Opens weights, tokenizer and data, adds LoRA, and starts the processes for as long as the block lasts.

    name       of the stage, as it is recorded in the weights' lineage
    kind       of data, see `open_data`
    weights    what it starts from without --from_weight: a name in out/; None: a fresh model
    tokenizer  the one that the model must have, where something else decides that (a teacher)
    options    of the data set
    """
    torch.manual_seed(config.seed)
    parent, model, tokenizer, origin = open_model(config, kind, weights, tokenizer)
    check_positions(config, model.config, "the model")  # now, not after a large file was tokenised
    output, notes = Weights(), [origin]
    if config.trains_adapter:
        output, note = add_adapter(config, model, parent)
        notes.append(note)
    data = open_data(dataset, config, kind, tokenizer, **options)
    with start(config) as backend, explained(config, model, backend.world):
        torch.manual_seed(config.seed + backend.rank)  # dropout: other samples on every rank
        yield Stage(name, config, model, tokenizer, data, backend, output, notes, parent)


def run_stage(
    name: str,
    config: StageConfig,
    objective: Objective,
    dataset: type[TokenDataset],
    *,
    kind: str,
    weights: str | None,
    packing: bool = True,
    **options,
) -> Path:
    """A stage that needs nothing in between; the arguments are those of `start_stage` and `Stage.train`."""
    with start_stage(name, config, dataset, kind=kind, weights=weights, **options) as stage:
        return stage.train(objective, packing=packing)


def add_adapter(config: StageConfig, model: CausalLM, parent: Checkpoint | None) -> tuple[AdapterOnly, str]:
    """Freezes the model and adds the adapter that --lora_... describe -> what is written, and a line to print."""
    if parent is None:
        raise UserError("--use_lora: a fresh model has no weights to keep; name those to start from with --from_weight")
    assert config.lora_rank is not None  # `trains_adapter` implies it
    settings = LoRASettings(
        config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets, config.use_rslora
    )
    known = linear_layers(model)
    targets = [known[name] for name in find_targets(model, settings.targets)]
    most = max(min(layer.in_features, layer.out_features) for layer in targets)
    if settings.rank > most:  # B A has at most this rank, and a larger A and B hold more numbers than W
        raise UserError(
            f"--lora_rank {settings.rank}: the layers that it adapts have a rank of at most {most}; 8 to 64 is usual"
        )
    freeze(model)
    layers = add_lora(model, settings)
    merged = weights_name(f"{config.save_weight}_merged", model.config) if config.merge_lora else ""
    output = AdapterOnly(settings, parent, config.bits, config.save_peft, merged)
    note = f"adapters beside {len(layers)} layers: {', '.join(config.lora_targets)}"
    if config.bits:
        note += f"; the weights in {config.bits} bits, {bytes_per_parameter(model):.2f} bytes each over the whole model"
    return output, note
