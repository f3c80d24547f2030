"""Packed rows on a CPU: forward and backward pass of a model with each kernel for attention, in turns.

    python benchmarks/attention.py                           # small in fp32, documents of 128 to 384 tokens
    python benchmarks/attention.py --dtype bfloat16 --kernels sdpa blocked apart

The losses of all kernels are compared before any time is taken. Nothing is compiled.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import machine, seconds, show
from model.attention import find_segments
from model.config import ModelConfig
from model.transformer import CausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--tokens", type=int, default=2048, help="in all rows together")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048], help="of a row")
    parser.add_argument("--document", type=int, default=256, help="mean length")
    parser.add_argument("--kernels", nargs="+", default=["sdpa", "apart"])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = CausalLM(ModelConfig.preset(args.preset))
    model.compute_dtype = getattr(torch, args.dtype)
    print(f"{machine()}; {args.preset}, {args.dtype}, {args.tokens} tokens, documents of about {args.document}")
    for length in args.lengths:
        shape = (args.tokens // length, length)
        tokens = torch.randint(model.config.vocab_size, shape)
        ends = torch.randint(args.document // 2, args.document * 3 // 2 + 1, (args.tokens,)).cumsum(0)
        documents = torch.searchsorted(ends, torch.arange(tokens.numel()), right=True).view(shape)
        segments = find_segments(documents)

        def work(kernel: str) -> torch.Tensor:
            model.attention_kernel = kernel
            loss = model(tokens, targets=tokens, documents=documents, segments=segments).loss.mean()  # noqa: B023
            loss.backward()
            return loss.detach()

        losses = torch.stack([work(kernel) for kernel in args.kernels])
        if (losses - losses[0]).abs().max() > 0.01:
            sys.exit(f"the losses differ: {losses.tolist()}")
        times = {kernel: [] for kernel in args.kernels}
        for _ in range(args.rounds):
            for kernel in args.kernels:
                times[kernel].append(seconds(lambda: work(kernel)))  # noqa: B023
        first = times[args.kernels[0]]
        for kernel in args.kernels:
            show(f"{shape[0]} x {length}, {kernel}", times[kernel], "s")
        for kernel in args.kernels[1:]:
            ratios = [a / b for a, b in zip(first, times[kernel])]
            show(f"{shape[0]} x {length}, {kernel} against {args.kernels[0]}", ratios, "times as fast")


if __name__ == "__main__":
    main()
