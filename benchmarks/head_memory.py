"""Peak memory of a training step with a large vocabulary: the head in chunks against all logits at once.

    python benchmarks/head_memory.py                           # 4 x 2,048 tokens, 151,936 words: about 15 GB
    python benchmarks/head_memory.py --rows 1 --length 960     # about 2 GB
    python benchmarks/head_memory.py --device cuda --dtype bfloat16

The body is tiny (two layers, 128 wide), so that the head is what is measured. Each side runs in a process of its own,
with the same weights and tokens: two steps of AdamW, every position trained. Losses and gradients are compared.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def one_side(args) -> None:
    import torch

    from model import transformer
    from model.config import ModelConfig
    from trainer.loop.optim import build_optimizers
    from trainer.run.logger import peak_memory

    if args.side == "plain":
        transformer.LOGITS_AT_ONCE = 1 << 62
    torch.manual_seed(0)
    shape = dict(hidden_size=args.width, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = transformer.CausalLM(ModelConfig(vocab_size=args.vocab_size, **shape)).to(args.device)
    model.compute_dtype = getattr(torch, args.dtype)
    (optimizer,) = build_optimizers(model, "adamw", 0.1)
    tokens = torch.randint(args.vocab_size, (args.rows, args.length + 1)).to(args.device)
    losses, norms = [], []
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss.mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps(dict(peak=peak_memory(), losses=losses, norms=norms)))


def measure(args, side: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}: {(done.stderr.strip() or f'ended with {done.returncode}; too little memory?')[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", default="float32", help="float32, or bfloat16 on hardware that has it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return one_side(args)
    plain, chunks = measure(args, "plain"), measure(args, "chunks")
    for name in ("losses", "norms"):
        far = max(abs(a / b - 1) for a, b in zip(plain[name], chunks[name]))
        print(f"{name}: {', '.join(f'{value:.6f}' for value in plain[name])}, relative difference {far:.1e}")
        if far > (1e-5 if args.dtype == "float32" else 1e-2):
            sys.exit("the two sides differ: no memory is compared")
    from benchmarks.common import show  # not at the top: the sides, which are measured, do not need it

    print(f"{args.rows} x {args.length} positions, {args.vocab_size:,} words, {args.dtype}, {args.device}")
    show("all at once", plain["peak"], "GiB")
    show("in chunks", chunks["peak"], "GiB")
    show("in chunks against all at once", chunks["peak"] / plain["peak"], "times as much", "0.4 at the default size")


if __name__ == "__main__":
    main()
