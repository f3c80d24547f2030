"""Other people's models: how long loading takes, and what training an adapter beside 16, 8 and 4 bits costs.

    python benchmarks/low_bits.py                                           # the shape of Qwen2 0.5B, random weights
    python benchmarks/low_bits.py --shape Llama-2-7B --modes 4 --recompute  # writes 13.5 GB
    python benchmarks/low_bits.py --shape tiny --batches 1x64 --rounds 1    # to see it run

1. Loading a sharded directory in bf16, compared with reading its files into memory once; and the peak of the process
   above what it had before, in sizes of the model.
2. LoRA of rank 8 on all linear layers, on batches of random tokens (rows x positions): trained tokens per second, and
   bytes per parameter of the base in the whole process. `peft` is transformers' model in bf16 with peft's adapter.
Each measurement is a process of its own; rounds alternate. The files are read once before any time is taken.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save_file

from benchmarks.common import machine, seconds, show
from benchmarks.memory_table import MODELS
from model.checkpoint import load_weights
from model.config import ModelConfig
from model.cost import count_parameters
from model.interop.hf import config_to_hf
from model.lora import LoRASettings, add_lora
from model.precision import keep_freed_memory
from model.transformer import CausalLM

SHAPES = {
    "tiny": ModelConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=4096),
    **MODELS,
}
SHARD = 2 << 30  # bytes


def write_directory(folder: Path, config: ModelConfig) -> None:
    """Random weights in bf16, a shard at a time, so that no more than one is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        state = CausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    shards, size = [{}], 0
    for name, tensor in state.items():
        if size > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += 2 * tensor.numel()
    places = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02) for name, t in shard.items()}
        for name, tensor in tensors.items():
            if "norm" in name:
                tensor.fill_(1)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8"
    )
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most. ru_maxrss would begin with those of the process before it."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def read_files(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.read_bytes()


def measure_loading(folder: Path) -> dict[str, float]:
    reading = seconds(lambda: read_files(folder))
    loading = seconds(lambda: load_weights(folder).build(torch.bfloat16))
    return dict(reading=reading, loading=loading)


def measure_peak(folder: Path) -> float:
    before = memory("VmHWM")
    model = load_weights(folder).build(torch.bfloat16)
    return (memory("VmHWM") - before) / sum(p.nbytes for p in model.parameters())


def measure_training(mode: str, folder: Path, batches: list[list[int]], steps: int, recompute: bool) -> dict:
    """mode: bf16, 8, 4 or peft -> among others tokens per second and the peak so far, for each (rows, positions). The
    first step of each is not counted."""
    torch.manual_seed(0)
    started = time.perf_counter()
    model, loss_of = (peft_model if mode == "peft" else own_model)(mode, folder, recompute)
    found = dict(loading=time.perf_counter() - started, loaded=memory("VmRSS"), tokens=[], peak=[], loss=[])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(rows: torch.Tensor) -> float:
        loss = loss_of(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for rows, length in batches:
        first, *others = torch.randint(16, 4096, (steps + 1, rows, length + 1))
        found["loss"].append(step(first))
        times = [seconds(lambda tokens=tokens: step(tokens)) for tokens in others]
        found["tokens"].append(rows * length / statistics.median(times))
        found["peak"].append(memory("VmHWM"))
    return found


def own_model(mode: str, folder: Path, recompute: bool):
    keep_freed_memory()  # as every stage does
    bits = None if mode == "bf16" else int(mode)
    model = load_weights(folder).build(torch.bfloat16, bits)
    add_lora(model, LoRASettings(rank=8))
    model.compute_dtype, model.recompute = torch.bfloat16, recompute
    return model.train(), lambda tokens, targets: model(tokens, targets=targets).loss.mean()


def peft_model(_: str, folder: Path, recompute: bool):
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if recompute:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

    def loss_of(tokens, targets):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return model.train(), loss_of


def apart(function, *arguments):
    """The function's result, computed in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def batch(text: str) -> list[int]:
    rows, length = map(int, text.split("x"))
    return [rows, length]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2-0.5B")
    parser.add_argument("--dir", help="where the random model is written, and kept (default: a temporary directory)")
    parser.add_argument("--modes", nargs="+", default=["bf16", "4", "peft"], choices=["bf16", "8", "4", "peft"])
    parser.add_argument("--batches", nargs="+", type=batch, default=[[1, 128], [1, 512]], help="from small to large")
    parser.add_argument("--recompute", action="store_true", help="activations (activation checkpointing), on all sides")
    parser.add_argument("--steps", type=int, default=3, help="of each batch in a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    config = SHAPES[args.shape]
    base = count_parameters(config)
    with ExitStack() as stack:
        folder = Path(args.dir or stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").is_file():
            write_directory(folder, config)
        print(f"{machine()}; {args.shape}: {base:,} parameters, {2 * base / 1e9:.2f} GB in bf16")
        read_files(folder)

        loads = [apart(measure_loading, folder) for _ in range(args.rounds)]
        ratio = [one["loading"] / one["reading"] for one in loads]
        show("loading in bf16", [one["loading"] for one in loads], "s")
        show("loading against reading", ratio, "times as long", "1.2")
        show("peak above the process before", apart(measure_peak, folder), "times the model")

        runs = {mode: [] for mode in args.modes}
        for _ in range(args.rounds):
            for mode, found in runs.items():
                found.append(apart(measure_training, mode, folder, args.batches, args.steps, args.recompute))
        print(f"LoRA{', recomputing' if args.recompute else ''}; speed compared with {args.modes[0]}")
        for mode, found in runs.items():
            loaded = max(one["loaded"] for one in found) / base
            show(f"{mode}: loading", [one["loading"] for one in found], "s")
            show(f"{mode}: loaded", loaded, "bytes a parameter")
            for i, (rows, length) in enumerate(args.batches):
                name, first = f"{mode}, {rows} x {length}", runs[args.modes[0]]
                show(name, [one["tokens"][i] for one in found], "tokens/s")
                show(name, [one["tokens"][i] / other["tokens"][i] for one, other in zip(found, first)], "times as fast")
                most = max(one["peak"][i] for one in found)
                show(f"{name}: at most", most / base, "bytes a parameter")
                show(f"{name}: at most", most / 2**30, "GiB")
                print(f"{name}: first loss {found[0]['loss'][i]:.3f}")


if __name__ == "__main__":
    main()
