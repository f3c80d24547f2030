"""Useful (trained) tokens per second of fine-tuning, against the usual small trainer's way with the same model.

    python benchmarks/sft.py --data_path my_chats.jsonl           # small, 16 examples a step
    python benchmarks/sft.py --data_path my_chats.jsonl --rounds 3 --steps 2

Ours: the engine as the stage runs it, packed rows, the CPU's best precision, the head on trained positions. Theirs:
every example padded to 512, logits everywhere, in fp32 and in bf16. All see the same 16 examples, and their
first losses are compared.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import data_flags, engine_step, machine, seconds, show
from common.options import parse
from dataset.tokens.examples import SFTDataset
from model.config import ModelConfig
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.inputs import open_data
from trainer.loop.backend import Backend
from trainer.loop.engine import Engine, Job
from trainer.losses.next_token import NextToken
from trainer.train_full_sft import SFTConfig

AIMS = {"float32": "10", "bfloat16": "7"}


def padded(dataset, examples, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One example a row: tokens and targets (B, length)."""
    tokens, targets = np.zeros((2, len(examples), length), np.int64)
    targets -= 100
    for row, example in enumerate(examples):
        ids, trained = dataset.tokens(example), dataset.trained(example)
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = np.where(trained[1:], ids[1:].astype(np.int64), -100)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def usual_step(model: CausalLM, rate: float, dtype: torch.dtype, rows: Callable) -> Callable[[int], float]:
    """A plain loop around a copy of the model. rows: number of a step -> its tokens and targets"""
    model = copy.deepcopy(model)
    model.attention_kernel, model.compute_dtype = "sdpa", dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)

    def step(number: int) -> float:
        tokens, targets = rows(number)
        loss = F.cross_entropy(model(tokens).logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="default: the tiny world's")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each side in a round")
    parser.add_argument("--compile", default="on")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *data_flags(args.data_path),
            *("--save_dir", folder, "--cache_dir", folder, "--device", "cpu", "--on_bad_row", "skip"),
            *("--batch_size", str(args.batch_size), "--max_seq_len", str(args.length), "--compile", args.compile),
            *("--recipe", "classic", "--schedule", "constant", "--warmup_steps", "0"),
        ]
        config, tokenizer = parse(SFTConfig, flags), Tokenizer.load()
        torch.manual_seed(0)
        model = CausalLM(ModelConfig.preset(args.preset))
        data = open_data(SFTDataset, config, "sft", tokenizer, on_long="truncate")
        job = Job("full_sft", config, model, NextToken(), tokenizer, data, packing=True)
        engine = Engine(job, Backend(torch.device("cpu")))
        engine.model.train()
        rows = lambda step: padded(data.train, engine.loader.examples(step).tolist(), args.length)
        theirs = {name: usual_step(model, config.learning_rate, getattr(torch, name), rows) for name in AIMS}

        ours = lambda step: engine_step(engine, engine.loader.batches(step))
        sides = {"ours": ours, **theirs}
        print("loss", *(f"{name:>8}" for name in sides))
        for step in range(2):
            first = [side(step) for side in sides.values()]
            print(f"{step:4}", *(f"{loss:8.4f}" for loss in first))
            if max(first) - min(first) > 0.02:
                sys.exit("the losses differ: no speed is compared")
        for step in range(2, 12):  # every number of rows once, so that nothing is compiled while time is taken
            ours(step)

        rates: dict[str, list[float]] = {name: [] for name in sides}
        step, trained, positions = 12, 0, 0
        for _ in range(args.rounds):
            steps = range(step, step + args.steps)
            step += args.steps
            units = [sum(batch.trained_tokens for batch in engine.loader.batches(s)) for s in steps]
            trained, positions = trained + sum(units), positions + len(units) * args.batch_size * args.length
            for name, side in sides.items():
                rates[name].append(sum(units) / seconds(lambda: [side(s) for s in steps]))  # noqa: B023
        share = f"{trained / positions:.0%} of the padded positions are trained on"
        print(f"\n{machine()}; {args.preset}, {args.batch_size} examples a step, {share}")
        for name, values in rates.items():
            show(name, values, "trained tokens/s")
        for name, aim in AIMS.items():
            ratios = [a / b for a, b in zip(rates["ours"], rates[name])]
            show(f"ours against {name}", ratios, "times as fast", aim)


if __name__ == "__main__":
    main()
