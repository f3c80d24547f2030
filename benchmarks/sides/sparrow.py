"""A stage of ours, in turns: benchmarks/sides/sparrow.py train_pretrain --preset nano --max_steps 500 ..."""

import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.sides.slices import Slices
from model.checkpoint import save_weights
from trainer.loop.engine import Engine


def main():
    slices, models = Slices(), []
    step = Engine.train_step

    def save(path: Path) -> None:
        save_weights(path, models[0], tokenizer={}, lineage=[])

    def counted(self, batches):
        if not models:
            models.append(self.model)
        slices.before_step(save)
        return step(self, batches)

    Engine.train_step = counted
    stage = importlib.import_module(f"trainer.{sys.argv[1]}")
    sys.argv = [f"trainer/{sys.argv[1]}.py", *sys.argv[2:]]
    slices.begin()
    stage.main()
    slices.end(save)


if __name__ == "__main__":
    main()
