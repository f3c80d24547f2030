"""Other people's models: how long loading takes, and what training an adapter beside 16, 8 and 4 bits costs.

    python benchmarks/low_bits.py                                       # the shape of Qwen2 0.5B, random weights
    python benchmarks/low_bits.py --shape 7b --modes 4 --rounds 1       # of Llama 2 7B: writes 13.5 GB
    python benchmarks/low_bits.py --shape tiny --length 64 --rounds 1   # to see it run

1. Loading a sharded directory in bf16, compared with reading its files into memory once; and the peak of the process
   above what it had before, in sizes of the model.
2. LoRA of rank 8 on all linear layers, activation checkpointing, one row of --length random tokens a step: trained
   tokens per second, and bytes per parameter of the base at the peak of the whole process. `peft` is transformers'
   model with peft's adapter, in bf16, without activation checkpointing.
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
from model.checkpoint import load_weights
from model.config import ModelConfig
from model.interop.hf import config_to_hf
from model.lora import LoRASettings, add_lora
from model.transformer import CausalLM

COMMON = dict(max_position_embeddings=4096)
SHAPES = {
    "tiny": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096),
    "0.5b": dict(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        attention_bias=True,
    ),
    "7b": dict(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
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


def peak() -> int:
    """Bytes, of this process. Linux's ru_maxrss would begin with the size of the process that started it."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def read_files(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.read_bytes()


def measure_loading(folder: Path) -> dict[str, float]:
    reading = seconds(lambda: read_files(folder))
    loading = seconds(lambda: load_weights(folder).build(torch.bfloat16))
    return dict(reading=reading, loading=loading)


def measure_peak(folder: Path) -> float:
    before = peak()
    model = load_weights(folder).build(torch.bfloat16)
    return (peak() - before) / sum(p.nbytes for p in model.parameters())


def measure_training(mode: str, folder: Path, length: int, steps: int) -> dict[str, float]:
    """mode: bf16, 8, 4 or peft. The first step is not counted."""
    torch.manual_seed(0)
    started = time.perf_counter()
    model, loss_of = (peft_model if mode == "peft" else own_model)(mode, folder)
    loading, loaded = time.perf_counter() - started, peak()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(16, 4096, (steps + 1, 1, length + 1))

    def step(row: torch.Tensor) -> None:
        loss_of(row[:, :-1], row[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(tokens[0])
    times = [seconds(lambda row=row: step(row)) for row in tokens[1:]]
    return dict(tokens=length / statistics.median(times), loaded=loaded, peak=peak(), loading=loading)


def own_model(mode: str, folder: Path):
    bits = None if mode == "bf16" else int(mode)
    model = load_weights(folder).build(torch.bfloat16, bits)
    add_lora(model, LoRASettings(rank=8))
    model.compute_dtype, model.recompute = torch.bfloat16, True
    return model.train(), lambda tokens, targets: model(tokens, targets=targets).loss.mean()


def peft_model(_: str, folder: Path):
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--dir", help="where the random model is written, and kept (default: a temporary directory)")
    parser.add_argument("--modes", nargs="+", default=["bf16", "8", "4"], choices=["bf16", "8", "4", "peft"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="of each mode in a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    config = ModelConfig(**COMMON | SHAPES[args.shape])
    with torch.device("meta"):
        base = CausalLM(config).num_parameters()
    with ExitStack() as stack:
        folder = Path(args.dir or stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").is_file():
            write_directory(folder, config)
        print(f"{machine()}; {args.shape}: {base:,} parameters, {2 * base / 1e9:.2f} GB in bf16")
        read_files(folder)

        found = [apart(measure_loading, folder) for _ in range(args.rounds)]
        ratio = [one["loading"] / one["reading"] for one in found]
        show("loading in bf16", [one["loading"] for one in found], "s")
        show("loading against reading", ratio, "times as long", "1.2")
        show("peak above the process before", apart(measure_peak, folder), "times the model")

        runs = {mode: [] for mode in args.modes}
        for _ in range(args.rounds):
            for mode in args.modes:
                runs[mode].append(apart(measure_training, mode, folder, args.length, args.steps))
        first = statistics.median(one["tokens"] for one in runs[args.modes[0]])
        print(f"LoRA, 1 x {args.length} tokens; speed compared with {args.modes[0]}")
        for mode, found in runs.items():
            speed = [one["tokens"] for one in found]
            loaded, most = (max(one[name] for one in found) for name in ("loaded", "peak"))
            show(f"LoRA, {mode}", speed, "tokens/s")
            show(f"LoRA, {mode}, speed", statistics.median(speed) / first, f"times {args.modes[0]}")
            show(f"LoRA, {mode}, loading", [one["loading"] for one in found], "s")
            show(f"LoRA, {mode}, loaded", loaded / base, "bytes a parameter")
            show(f"LoRA, {mode}, at most", most / base, "bytes a parameter")
            show(f"LoRA, {mode}, at most", most / 2**30, "GiB")


if __name__ == "__main__":
    main()
