"""MiniMind's own loop, in turns. It is started by benchmarks/against_minimind.py, with a JSON text:

    {"directory": of the checkout, "stage": "train_pretrain", "dataset": "PretrainDataset", "data": file,
     "config": for its MiniMindConfig, "max_seq_len", "batch_size", "accumulation_steps", "learning_rate", "steps",
     "bf16": whether to run its loop under autocast, which it does on GPUs only, "from": weights or ""}

What runs is `train_epoch` of its script, with the dataset, the model and the optimiser as that script makes them. Only
the data loader is wrapped, to wait between two steps.
"""

import importlib
import json
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

from slices import Slices


def main():
    wanted = json.loads(sys.argv[1])
    sys.path.insert(0, wanted["directory"])
    slices = Slices()

    import torch
    from transformers import AutoTokenizer

    stage = importlib.import_module(f"trainer.{wanted['stage']}")
    datasets = importlib.import_module("dataset.lm_dataset")
    architecture = importlib.import_module("model.model_minimind")

    slices.begin()
    torch.manual_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(str(Path(wanted["directory"], "model")))
    config = architecture.MiniMindConfig(**wanted["config"])
    model = architecture.MiniMindForCausalLM(config)
    if wanted["from"]:
        model.load_state_dict(torch.load(wanted["from"], map_location="cpu"), strict=False)
    rows = getattr(datasets, wanted["dataset"])(wanted["data"], tokenizer, max_length=wanted["max_seq_len"])
    steps, rate = wanted["steps"], wanted["learning_rate"]

    def save(path: Path) -> None:
        torch.save({name: tensor.float() for name, tensor in model.state_dict().items()}, path)
        path.with_suffix(".json").write_text(json.dumps(wanted["config"]), encoding="utf-8")

    class Turns:
        """Its data loader, over and over, with a wait between two steps."""

        def __iter__(self):
            done = 0
            while done < steps:
                for batch in torch.utils.data.DataLoader(
                    rows, batch_size=wanted["batch_size"], shuffle=True, num_workers=wanted["num_workers"]
                ):
                    if done == steps:
                        return
                    slices.before_step(save)
                    done += 1
                    yield batch

    stage.args = Namespace(
        device="cpu",
        epochs=1,
        learning_rate=rate,
        accumulation_steps=wanted["accumulation_steps"],
        grad_clip=1.0,
        log_interval=100,
        save_interval=steps,
        save_dir=".",
        save_weight="minimind",
        dtype="bfloat16",
    )
    stage.lm_config, stage.model = config, model.train()
    stage.autocast_ctx = torch.amp.autocast("cpu", dtype=torch.bfloat16) if wanted["bf16"] else nullcontext()
    stage.scaler = torch.amp.GradScaler("cpu", enabled=False)
    stage.optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    stage.train_epoch(0, Turns(), steps)
    slices.end(save)


if __name__ == "__main__":
    main()
