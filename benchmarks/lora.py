"""LoRA's speed: against our own full fine-tuning, against peft, and against trl's trainer as it is shipped.

    python benchmarks/lora.py --data_path my_chats.jsonl            # small, 16 examples a step, rank 8 on attention
    python benchmarks/lora.py --data_path my_chats.jsonl --rounds 2 --steps 1 --preset nano --length 128

1. A step of LoRA and a step of full fine-tuning: the same model, the same packed batches.
2. A step of LoRA and one of peft on transformers' Llama with the same weights and settings: the same rows of random
   tokens, no packing, bf16 autocast there, so that only the arithmetic is compared.
3. Trained tokens per second of LoRA and of trl's SFTTrainer (padding, gradient checkpointing off, bf16), the same
   examples a step; each takes whole steps, ours with its packing.
First losses of both sides are compared before any time is taken; rounds alternate.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import RandomRows, data_flags, hugging_face_step, machine, seconds, show
from common.options import parse
from dataset.tokens.examples import SFTDataset
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.export import save_hf
from model.lora import LoRASettings, add_lora, freeze
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.inputs import Data, open_data
from trainer.loop.backend import Backend
from trainer.loop.engine import Engine, Job
from trainer.losses.next_token import NextToken
from trainer.train_lora import LoRAConfig

SETTINGS = LoRASettings(rank=8, alpha=16, targets=("attention",))


class Side:
    """Our engine, step by step."""

    def __init__(self, args, config, tokenizer, data, packing: bool, state: dict, lora: bool):
        model = CausalLM(ModelConfig.preset(args.preset))
        model.load_state_dict(state)
        if lora:
            freeze(model)
            add_lora(model, SETTINGS)
        job = Job("benchmark", config, model, NextToken(), tokenizer, data, packing=packing)
        self.engine = Engine(job, Backend(torch.device("cpu")))
        self.engine.model.train()

    def __call__(self, batches) -> float:
        self.engine._set_learning_rate()
        result = self.engine.train_step(batches)
        return float(result.metrics["loss"]) / result.units


def compare(
    title: str, ours, theirs, steps: list, rounds: int, names=("ours", "theirs"), tolerance=0.02, alike: int = 2
) -> None:
    """ours, theirs: callables of one element of `steps`, which are gone through in turn. alike: steps whose losses have
    to agree."""
    print(f"\n{title}\nstep  {names[0]:>9} {names[1]:>9}  (loss)")
    for i, step in enumerate(steps[:alike]):
        a, b = ours(step), theirs(step)
        print(f"{i:4}  {a:9.4f} {b:9.4f}")
        if abs(a - b) > tolerance:
            sys.exit("the losses differ: no speed is compared")
    for step in steps:  # every number of rows once, so that nothing is compiled while time is taken
        ours(step), theirs(step)
    times = {name: [] for name in names}
    for _ in range(rounds):
        for name, side in zip(names, (ours, theirs)):
            times[name].append(seconds(lambda: [side(step) for step in steps]) / len(steps))  # noqa: B023
    for name, values in times.items():
        show(f"{name}: {title}", values, "s a step")
    ratios = [b / a for a, b in zip(*times.values())]
    show(f"{names[0]} against {names[1]}", ratios, "times as fast")


def their_model(state: dict, shape: ModelConfig, folder: Path):
    """transformers' model of the same weights with peft's adapter of the same settings, and a plain loop's step."""
    import peft
    import transformers

    save_hf(folder / "base", Checkpoint(folder, state, shape), Tokenizer.load().path, stop_ids={2})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    settings = peft.LoraConfig(
        r=SETTINGS.rank,
        lora_alpha=SETTINGS.alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    return model, settings


def peft_step(model, settings, bf16: bool, rate: float):
    import peft

    model = peft.get_peft_model(model, settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)

    return lambda batches: hugging_face_step(model, optimizer, batches[0], bf16).item()


def trl_trainer(model, settings, data: SFTDataset, args, bf16: bool, folder: Path):
    """trl's trainer over the same examples: their ids and which are trained on are handed over, so no template differs.
    Each call trains one step on the examples given."""
    import datasets
    import transformers
    import trl

    rows = {"input_ids": [], "labels": []}
    for i in range(len(data)):
        ids, trained = data.tokens(i).tolist(), data.trained(i).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([t if yes else -100 for t, yes in zip(ids, trained)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        max_length=args.length,
        learning_rate=1e-4,
        save_strategy="no",
        lr_scheduler_type="constant",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
    )
    trainer = trl.SFTTrainer(
        model,
        args=options,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=settings,
    )
    trainer.current_gradient_accumulation_steps = 1  # what train() would set
    trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    trainer.model.train()

    def step(examples: list[int]) -> float:
        batch = trainer.data_collator([{k: v[i] for k, v in rows.items()} for i in examples])
        loss = trainer.training_step(trainer.model, batch)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss.item()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="default: the tiny world's")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4, help="of random tokens, against peft")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--compile", default="on")
    args = parser.parse_args()

    shape, tokenizer = ModelConfig.preset(args.preset), Tokenizer.load()
    torch.manual_seed(0)
    model = CausalLM(shape)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    state = model.state_dict()
    print(f"{machine()}; {args.preset}, LoRA of rank {SETTINGS.rank} on {', '.join(SETTINGS.targets)}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [
            *data_flags(args.data_path),
            *("--save_dir", name, "--cache_dir", name, "--device", "cpu"),
            *("--batch_size", str(args.batch_size), "--max_seq_len", str(args.length), "--compile", args.compile),
            *("--schedule", "constant", "--warmup_steps", "0", "--learning_rate", "1e-4", "--max_steps", "100000"),
        ]
        config = parse(LoRAConfig, flags)
        data = open_data(SFTDataset, config, "sft", tokenizer, on_long="truncate")
        packed = (config, tokenizer, data, True, state)
        ours, full = Side(args, *packed, lora=True), Side(args, *packed, lora=False)
        bf16 = ours.engine.dtype == torch.bfloat16
        numbers = range(2 + args.steps)
        steps = [ours.engine.loader.batches(n) for n in numbers]
        compare("1. LoRA and full fine-tuning", ours, full, steps, args.rounds, ("LoRA", "full"), alike=1)

        config = parse(LoRAConfig, [*flags, "--batch_size", str(args.rows)])
        random = Data(RandomRows(256, args.length, shape.vocab_size), None, False, [])
        mine = Side(args, config, tokenizer, random, False, state, lora=True)
        theirs = peft_step(*their_model(state, shape, folder), bf16, config.learning_rate)
        steps = [mine.engine.loader.batches(n) for n in numbers]
        compare("2. LoRA and peft", mine, theirs, steps, args.rounds, ("ours", "peft"))

        ours = Side(args, *packed, lora=True)
        theirs = trl_trainer(*their_model(state, shape, folder), data.train, args, bf16, folder)
        loader = ours.engine.loader
        compare(
            "3. LoRA and trl's SFTTrainer",
            lambda n: ours(loader.batches(n)),
            lambda n: theirs(loader.examples(n).tolist()),
            list(numbers),
            args.rounds,
            ("ours", "trl"),
            tolerance=0.05,
        )
        trained = statistics.mean(sum(b.trained_tokens for b in loader.batches(n)) for n in numbers)
        print(f"a step has {trained:,.0f} trained tokens on average")


if __name__ == "__main__":
    main()
