"""What each backend keeps in memory and sends, by formula from 26M to 14B; checked against two processes; step times.

python benchmarks/scaling.py                          measures two processes on this machine's CPU, then computes
python benchmarks/scaling.py --rate 4e14 --size 7B    step times of devices that reach 400 TFLOP/s, up to 1,024 of them

Only the table headed "measured" is measured. The others are the formulas of docs/scaling.md, which it checks.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

SIZES = {"26M": 25_829_888, "104M": 104_030_976, "500M": 5e8, "1.5B": 1.5e9, "7B": 7e9, "14B": 14e9}
BACKENDS = ("ddp", "zero1", "zero2", "zero3")


def kept(backend: str, n: int) -> dict[str, float]:
    """Bytes per parameter on each of n devices, everything in fp32: weights, gradients, masters, moments."""
    shared = {
        "ddp": (),
        "zero1": ("moments",),
        "zero2": ("moments", "gradients"),
        "zero3": ("moments", "gradients", "weights"),
    }[backend]
    sizes = dict(weights=4, gradients=4, moments=8) | (dict(masters=4 / n) if backend != "ddp" else {})
    return {name: size / n if name in shared else size for name, size in sizes.items()}


def sent(backend: str, n: int, micro_batches: int = 1) -> float:
    """Bytes per parameter that each device sends in a step, by rings: reducing or gathering P numbers is (n-1)/n P."""
    times = {"ddp": 2, "zero1": 2, "zero2": micro_batches + 1, "zero3": 3 * micro_batches}[backend]
    return 4 * times * (n - 1) / n


def step_seconds(backend, size, n, rate, tokens, inside, between, node=8) -> tuple[float, float]:
    """(everything overlaps, nothing does) of a step with `tokens` tokens on each device: 6 FLOPs a weight and token."""
    compute = 6 * size * tokens / rate
    moving = size * sent(backend, n) / (inside if n <= node else between)
    return max(compute, moving), compute + moving


# ---- two processes ----


def worker(folder: Path) -> None:
    """Bytes of all tensors alive between the backward pass and the update, beside those before the model was made."""
    import torch

    from benchmarks.common import RandomRows
    from common.options import parse
    from model.config import ModelConfig
    from model.transformer import CausalLM
    from tokenizer.text import Tokenizer
    from trainer.inputs import Data
    from trainer.loop.engine import Engine, Job
    from trainer.loop.processes import start
    from trainer.losses.next_token import NextToken
    from trainer.train_pretrain import PretrainConfig

    def alive() -> int:
        gc.collect()
        storages = {}
        for item in gc.get_objects():
            if isinstance(item, torch.Tensor) and item.device.type != "meta":
                for tensor in (item, item.grad if item.is_leaf else None, getattr(item, "ds_tensor", None)):
                    if tensor is not None:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    flags = json.loads((folder / "flags.json").read_text())
    config = parse(
        PretrainConfig,
        [
            *flags,
            "--recipe=classic",
            f"--save_dir={folder}",
            "--device=cpu",
            "--dtype=float32",
            "--compile=off",
            "--max_seq_len=64",
            "--batch_size=1",
            "--max_steps=2",
        ],
    )
    with start(config) as backend, contextlib.redirect_stdout(io.StringIO()):
        before = alive()
        model = CausalLM(ModelConfig.preset(config.preset))
        size = model.num_parameters()
        rows = RandomRows(8, 64, 6400)
        job = Job("pretrain", config, model, NextToken(), Tokenizer.load(), Data(rows, None, False, []), packing=False)
        engine, found = Engine(job, backend), []
        del model
        update = backend.update

        def counted(*arguments):
            found.append(alive() - before)
            return update(*arguments)

        backend.update = counted
        for step in range(2):  # the moments exist from the second on
            engine.train_step(engine.loader.batches(step))
    (folder / f"rank{backend.rank}.json").write_text(json.dumps([found[-1], size]))


def measure(preset: str) -> None:
    from benchmarks.common import show

    print("\nmeasured: tensors alive on each of 2 processes before the update, fp32, against the formula")
    for backend in BACKENDS:
        flags = [f"--preset={preset}", "--backend=ddp" if backend == "ddp" else f"--zero_stage={backend[-1]}"]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "flags.json").write_text(json.dumps(flags))
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nproc_per_node=2",
                    "--standalone",
                    __file__,
                    "--worker",
                    folder,
                ],
                check=True,
                capture_output=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            ranks = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in (0, 1)]
        expected = sum(kept(backend, 2).values()) * ranks[0][1]
        show(f"{backend}, formula", expected / 2**20, "MiB")
        show(f"{backend}, both ranks", [bytes_ / 2**20 for bytes_, _ in ranks], "MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", help="size of the model that is measured")
    parser.add_argument("--size", default="7B", choices=SIZES, help="size whose step times are computed")
    parser.add_argument("--rate", type=float, help="FLOP/s that a device reaches (default: no step times)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a device computes in a step")
    parser.add_argument("--inside", type=float, default=450e9, help="bytes/s between devices of a machine (NVLink 4)")
    parser.add_argument("--between", type=float, default=50e9, help="bytes/s of a device to other machines (400 Gb/s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(Path(args.worker))
    print("computed: GiB on each device for weights, gradients, masters and moments in fp32 (activations come on top)")
    print(f"{'':7}" + "".join(f"{f'{b} x{n}':>11}" for n in (2, 8, 64) for b in BACKENDS))
    for name, size in SIZES.items():
        cells = [size * sum(kept(b, n).values()) / 2**30 for n in (2, 8, 64) for b in BACKENDS]
        print(f"{name:7}" + "".join(f"{cell:11,.2f}" for cell in cells))
    if args.rate:
        size = SIZES[args.size]
        print(
            f"\ncomputed, not measured: seconds a step of {args.size}, {args.tokens:,} tokens a device at "
            f"{args.rate:.3g} FLOP/s, {args.inside:.3g} and {args.between:.3g} bytes/s; all overlapped .. nothing"
        )
        for n in (1, 8, 64, 256, 1024):
            times = [step_seconds(b, size, n, args.rate, args.tokens, args.inside, args.between) for b in BACKENDS]
            print(f"{n:6,} " + "  ".join(f"{b} {low:.2f} .. {high:.2f}" for b, (low, high) in zip(BACKENDS, times)))
    measure(args.preset)


if __name__ == "__main__":
    main()
