"""One optimiser step of the 26M model against transformers' LlamaForCausalLM of the same size and the same weights.

    python benchmarks/train_step.py                          # small, 4 x 512 tokens, the CPU's best precision
    python benchmarks/train_step.py --rounds 3 --steps 2     # quicker

Both sides: bf16 compute, fp32 master weights, fused AdamW, gradient clipping, the same batches. Theirs: bf16 autocast
and SDPA, as the usual trainer calls it. The losses of the first steps are compared before any time is taken.
"""

import argparse
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import RandomRows, engine_step, hugging_face_llama, hugging_face_step, machine, seconds, show
from common.options import parse
from model.config import ModelConfig
from model.cost import step_flops
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.inputs import Data
from trainer.loop.backend import Backend
from trainer.loop.engine import Engine, Job
from trainer.losses.next_token import NextToken
from trainer.run.meter import gemm_rate
from trainer.train_pretrain import PretrainConfig


def our_engine(args, shape: ModelConfig, folder: str) -> Engine:
    flags = [
        *("--save_dir", folder, "--batch_size", str(args.rows), "--max_seq_len", str(args.length), "--device", "cpu"),
        *("--compile", args.compile, "--dtype", args.dtype, "--schedule", "constant", "--warmup_steps", "0"),
        *("--max_steps", "100000", "--recipe", "classic"),
    ]
    torch.manual_seed(0)
    model = CausalLM(shape)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    data = Data(RandomRows(4096, args.length, shape.vocab_size), None, False, [])
    job = Job("pretrain", parse(PretrainConfig, flags), model, NextToken(), Tokenizer.load(), data, packing=False)
    return Engine(job, Backend(torch.device("cpu")))


def their_step(engine: Engine, bf16: bool):
    """A plain training loop around transformers, from the same weights."""
    model, optimizer = hugging_face_llama(engine.model)
    for group in optimizer.param_groups:
        group["lr"] = engine.config.learning_rate
    ours = torch.backends.mkldnn.matmul.fp32_precision

    def step(batch) -> float:
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # torch's default, which our engine may have changed
        loss = hugging_face_step(model, optimizer, batch, bf16).item()
        torch.backends.mkldnn.matmul.fp32_precision = ours
        return loss

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--compile", default="on")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    shape = ModelConfig.preset(args.preset, qk_norm=False)  # Llama has no norms of queries and keys
    with tempfile.TemporaryDirectory() as folder:
        engine = our_engine(args, shape, folder)
        engine.model.train()
        bf16 = engine.dtype == torch.bfloat16
        theirs = their_step(engine, bf16)

        ours = lambda batch: engine_step(engine, [batch])
        batches = iter([engine.loader.batches(step)[0] for step in range(3 + args.rounds * args.steps)])
        print("step  our loss  their loss")
        for step in range(3):  # also warms both up
            batch = next(batches)
            a, b = ours(batch), theirs(batch)
            print(f"{step:4}  {a:8.4f}  {b:8.4f}")
            if abs(a - b) > 0.01:
                sys.exit("the losses differ: no speed is compared")

        positions = args.rows * args.length
        d, width = shape.hidden_size, shape.intermediate_size
        shapes = [
            (4096, 4096, 4096),
            (positions, d, width),
            (positions, width, d),
            (positions, d, d),
            (positions, d, shape.vocab_size),
        ]
        times, rates = {"ours": [], "theirs": []}, []
        for _ in range(args.rounds):
            rates.append(gemm_rate(shapes, engine.dtype, engine.backend.device))
            mine = [next(batches) for _ in range(args.steps)]
            for name, side in (("ours", ours), ("theirs", theirs)):
                times[name].append(seconds(lambda: [side(batch) for batch in mine]) / args.steps)  # noqa: B023
            rates.append(gemm_rate(shapes, engine.dtype, engine.backend.device))

        flops = step_flops(shape, positions, args.length)
        precision = str(engine.dtype).removeprefix("torch.")
        print(f"\n{machine()}; {args.preset}, {args.rows} x {args.length}, {precision}, compile {args.compile}")
        for name, values in times.items():
            shares = [flops / t / max(rates[2 * i], rates[2 * i + 1]) for i, t in enumerate(values)]
            show(name, values, "s a step")
            show(name, [positions / value for value in values], "tokens/s")
            show(name, shares, "of the GEMM rate")
        show("GEMM rate", [rate / 1e9 for rate in rates], "GFLOP/s")
        ratios = [b / a for a, b in zip(times["ours"], times["theirs"])]
        show("ours against theirs", ratios, "times as fast")


if __name__ == "__main__":
    main()
