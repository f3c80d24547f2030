"""Preference pairs per second and peak memory, reference pass included, against trl's DPOTrainer.

    python benchmarks/dpo.py --data_path my_pairs.jsonl            # small, 4 pairs a step, length 1,024
    python benchmarks/dpo.py --data_path my_pairs.jsonl --preset nano --length 256 --rounds 1 --steps 1

Both sides train the same weights on the same pairs: trl's model is transformers' Llama with our weights, and it is
handed the ids that our data set gives, prompts cut as ours are. Theirs as shipped (bf16, a second model as the
reference), but without gradient checkpointing, which would slow it down. Ours: the engine as the stage runs it, and in
the time of each step also the reading of its pairs by the reference, as if every pair were met once. First losses are
compared before any time is taken; rounds alternate. Each side's peak memory is that of a process of its own.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import data_flags, machine, seconds, show
from common.options import parse
from dataset.batches.preference import PairLoader, PreferenceDataset
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.export import save_hf
from model.precision import pick_dtype
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.inputs import open_data
from trainer.loop.backend import Backend
from trainer.loop.engine import Engine, Job
from trainer.losses.preference import Preference, read_answers
from trainer.train_dpo import DPOConfig

BETA, RATE = 0.1, 1e-6


def initial_model(preset: str) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.preset(preset))
    for name, parameter in model.named_parameters():  # of a fresh model the blocks do nothing: nothing to compare
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


class Ours:
    def __init__(self, args, folder: str):
        flags = [
            *data_flags(args.data_path),
            *("--save_dir", folder, "--cache_dir", folder, "--device", "cpu"),
            *("--batch_size", str(args.batch_size), "--max_seq_len", str(args.length), "--compile", "off"),
            *("--schedule", "constant", "--warmup_steps", "0", "--learning_rate", str(RATE), "--beta", str(BETA)),
        ]
        config, tokenizer = parse(DPOConfig, flags), Tokenizer.load()
        self.model, data = initial_model(args.preset), open_data(PreferenceDataset, config, "dpo", tokenizer)
        self.data, objective = data.train, Preference("sigmoid", BETA)
        job = Job("dpo", config, self.model, objective, tokenizer, data, packing=True, loader=PairLoader)
        self.engine = Engine(job, Backend(torch.device("cpu")))
        self.engine.model.train()

    def examples(self, step: int) -> list[int]:
        return self.engine.loader.examples(step).tolist()

    def __call__(self, step: int) -> float:
        """The reference's reading of the step's pairs, as `add_reference` does it, and the step."""
        loader = self.engine.loader
        values = torch.zeros(int(self.data.order.max()) + 1, 2)
        with torch.no_grad():
            for batch in loader.batches(step):
                found, _, _ = read_answers(self.model, batch)
                values[self.data.order[list(batch.examples)]] = found.float()
        loader.dataset.reference = values.numpy()
        self.engine._set_learning_rate()
        result = self.engine.train_step(loader.batches(step))
        return float(result.metrics["loss"]) / result.units


class Theirs:
    def __init__(self, args, folder: str, data: PreferenceDataset):
        import datasets
        import transformers
        import trl

        base, model = Path(folder) / "base", initial_model(args.preset)
        save_hf(base, Checkpoint(base, model.state_dict(), model.config), Tokenizer.load().path, stop_ids={2})
        models = [transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) for _ in range(2)]
        bf16 = pick_dtype("auto", torch.device("cpu"))[0] == torch.bfloat16
        options = trl.DPOConfig(
            output_dir=str(Path(folder) / "trl"),
            per_device_train_batch_size=args.batch_size,
            bf16=bf16,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            max_length=None,
            learning_rate=RATE,
            beta=BETA,
            lr_scheduler_type="constant",
            save_strategy="no",
            disable_tqdm=True,
        )
        self.trainer = trainer = trl.DPOTrainer(
            models[0],
            models[1],
            options,
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
            train_dataset=datasets.Dataset.from_list([dict(prompt="a", chosen="b", rejected="c")]),
        )
        trainer.current_gradient_accumulation_steps = 1  # what train() would set
        trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
        trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
        trainer.model = trainer.accelerator.prepare(trainer.model)
        trainer.model.train()
        self.data = data

    def __call__(self, examples: list[int]) -> float:
        rows = []
        for prompt, (chosen, _), (rejected, _) in map(self.data.pair, examples):
            rows.append(dict(prompt_ids=prompt.tolist(), chosen_ids=chosen.tolist(), rejected_ids=rejected.tolist()))
        trainer = self.trainer
        loss = trainer.training_step(trainer.model, trainer.data_collator(rows))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return float(loss)


def peak_mib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def one_side(args) -> None:
    """Some steps of one side, then its peak memory as the last line."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(args, folder)
        if args.side == "theirs":
            examples = [ours.examples(step) for step in range(args.steps)]
            theirs = Theirs(args, folder, ours.data)
            del ours.engine, ours.model
            [theirs(own) for own in examples]
        else:
            [ours(step) for step in range(args.steps)]
    print(peak_mib())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="default: the tiny world's")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--side", choices=("ours", "theirs"), help="only this one, for its peak memory")
    args = parser.parse_args()
    if args.side:
        return one_side(args)

    for side in ("ours", "theirs"):  # first, since a process begins with its parent's peak
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
        print(f"{side:7} peak memory {float(done.stdout.split()[-1]):,.0f} MiB over {args.steps} steps", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(args, folder)
        theirs = Theirs(args, folder, ours.data)
        print("step  our loss  their loss")
        for step in range(2):
            a, b = ours(step), theirs(ours.examples(step))
            print(f"{step:4}  {a:8.4f}  {b:8.4f}")
            if abs(a - b) > 0.02:
                sys.exit("the losses differ: no speed is compared")
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        step = 2
        for _ in range(args.rounds):
            steps = range(step, step + args.steps)
            step += args.steps
            pairs = sum(len(ours.examples(s)) for s in steps)
            rates["ours"].append(pairs / seconds(lambda: [ours(s) for s in steps]))  # noqa: B023
            rates["theirs"].append(pairs / seconds(lambda: [theirs(ours.examples(s)) for s in steps]))  # noqa: B023
    print(f"\n{machine()}; {args.preset}, {args.batch_size} pairs a step, length {args.length:,}")
    for name, values in rates.items():
        show(name, values, "pairs/s")
    ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"])]
    show("ours against theirs", ratios, "times as fast", "2")


if __name__ == "__main__":
    main()
