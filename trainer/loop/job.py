"""What a stage hands to the engine."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from typing import Protocol

from common.files import code_version, relative_to_root
from dataset.batches.loader import Batch, Loader
from model.checkpoint import Checkpoint
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.inputs import Data
from trainer.losses.base import Objective
from trainer.run.artifacts import Weights
from trainer.stage import StageConfig


class Rollout(Protocol):
    """Makes the batches of a step with the model as it is now, for stages whose data the model writes itself."""

    def __call__(self, model: CausalLM, batches: list[Batch], step: int) -> list[Batch]:
        """This rank's micro-batches from the loader -> the ones that are trained on. step: its number, from 0.

        The result is on the CPU, like the loader's batches. It has as many micro-batches on every rank, and at least
        one unit over all ranks. `Batch.examples` still says which rows of the data set a batch comes from. The model is
        in training mode before, and has to be in training mode again afterwards. Whatever is random comes from torch's
        global generators, whose states are saved for each rank, or from a generator seeded with the step's number.
        Then a resumed run repeats what an undisturbed one does.
        """
        ...


class Preparation(Protocol):
    """Computes what batches need of the model as it is before training: the reference of preferences, say."""

    def __call__(self, needed: list[tuple[Loader, int]]) -> str:
        """Called once, on all ranks, before a checkpoint is loaded -> a line to print.

        needed: each loader, and how many of its first steps the run takes; at most an epoch, which has every example
        """
        ...


@dataclass
class Job:
    """A stage, as the engine sees it."""

    stage: str
    config: StageConfig
    model: CausalLM
    objective: Objective
    tokenizer: Tokenizer
    data: Data
    packing: bool  # True: batch_size counts examples, which are packed into rows. False: it counts rows
    parent: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)  # lines printed when the run starts
    output: Weights = field(default_factory=Weights)  # which files are written
    loader: type[Loader] = Loader
    rollout: Rollout | None = None  # None: the batches of the loader are trained on as they are
    prepare: Preparation | None = None  # None: nothing has to be computed before training
    code: str = field(default_factory=code_version)  # as the run begins: files may be edited before it saves

    def origin(self) -> dict:
        """What the weights come from, for their lineage (evaluation/lineage.py shows it): plain values."""
        train, parent = self.data.train, self.parent
        return dict(
            stage=self.stage,
            data=train.fingerprint,
            rows=len(train),
            files=train.files,
            parent=parent.hash if parent else None,
            parent_path=relative_to_root(str(parent.path)) if parent else None,
            seed=self.config.seed,
            command=shlex.join(sys.argv),
            code=self.code,
        )
