"""The parts of the GPU benchmark, each a function that returns what it measured: see benchmarks/gpu/run.sh.

    python benchmarks/gpu/parts.py --device cpu --tiny small sft          # prints BEGIN and END lines with JSON

Two sides are measured in turns, round by round, within one process. Times are medians with the least and the greatest.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])


if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench


class Part(NamedTuple):
    run: Callable[[Bench], dict]
    limit: int  # seconds


# ---- the parts


def facts(bench: Bench) -> dict:
    import torch

    from benchmarks.gpu.bench import spread

    found = dict(torch=torch.__version__, compile=bench.compile)
    if bench.cuda:
        name, (major, minor) = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
        found |= dict(card=name, capability=f"{major}.{minor}", cuda=torch.version.cuda)
        found["GiB"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        block = torch.empty(2**30, dtype=torch.uint8, device=bench.device)
        times = [bench.seconds(lambda: block.clone()) for _ in range(8)][2:]
        found["copy, GB/s read and written"] = spread([2 * block.numel() / t / 1e9 for t in times])
    installed = {name: importlib.util.find_spec(name) is not None for name in ("transformers", "peft", "trl")}
    return dict(**found, **{"GEMM, TFLOP/s": bench.gemm() / 1e12}, installed=installed)


def device(bench: Bench) -> dict:
    """The device doctor, which needs no pytest."""
    from evaluation.device import dtypes_of, run_checks

    found, failed = {}, []
    for name, outcomes in run_checks(bench.device, dtypes_of(bench.device)):
        errors = (outcome.message or f"{outcome.error:.2g}" for outcome in outcomes.values())
        found[name] = ", ".join(f"{str(dtype)[6:]} {error}" for dtype, error in zip(outcomes, errors))
        failed += [] if all(outcome.passed for outcome in outcomes.values()) else [name]
    return found | (dict(error=f"{len(failed)} of {len(found)} checks failed: {'; '.join(failed)}") if failed else {})


def small(bench: Bench) -> dict:
    return bench.against_transformers("small", 128, 512, 0)


def base(bench: Bench) -> dict:
    return bench.against_transformers("base", 16, 2048, 400)


def sft(bench: Bench) -> dict:
    """Useful tokens/s of packed chats, against the same chats padded to the longest of the batch."""
    import numpy as np
    import torch

    from benchmarks.common import hugging_face_llama
    from benchmarks.gpu.bench import ratio, spread
    from dataset.tokens.examples import SFTDataset
    from tokenizer.text import Tokenizer

    count, length = 8 if bench.tiny else 1024, 128 if bench.tiny else 512  # of fewer chats, the host's time is measured
    path = bench.world("sft")
    data = SFTDataset(path, Tokenizer.load(), max_seq_len=length, cache_dir=bench.folder)
    engine = bench.engine(bench.model(bench.shape("small")), data, count, length, packing=True)
    step, (model, optimizer) = bench.step_of(engine), hugging_face_llama(engine.model)
    bf16 = bench.dtype == torch.bfloat16

    def theirs():
        examples = engine.loader.examples(engine.step % engine.loader.steps_per_epoch).tolist()
        longest = max(int(data.lengths[i]) for i in examples)
        tokens, labels = np.zeros((2, len(examples), longest), np.int64)
        labels -= 100
        for row, i in enumerate(examples):
            ids, trained = data.tokens(i), data.trained(i)
            tokens[row, : len(ids)] = ids
            labels[row, : len(ids)] = np.where(trained, ids.astype(np.int64), -100)
        tokens, labels = (torch.from_numpy(part).to(bench.device) for part in (tokens, labels))
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, attention_mask=(tokens != 0).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    few = 1 if bench.tiny else 2 * engine.loader.steps_per_epoch  # each number of rows is compiled
    first = bench.seconds(lambda: [step() for _ in range(few)])
    theirs()
    trained = statistics.mean(sum(b.trained_tokens for b in engine.loader.batches(s)) for s in range(8))
    times = bench.in_turns(dict(ours=step, theirs=theirs))
    return dict(
        about=f"small, {count} short chats a step, {trained:,.0f} trained tokens a step",
        **{f"{name} trained tokens/s": spread([trained / t for t in own]) for name, own in times.items()},
        **{"times as fast": ratio(times, "ours", "theirs")},
        seconds_of_the_first_steps=first,
    )


def moe(bench: Bench) -> dict:
    """The mixture's tokens/s as a share of those of a dense model as large as the experts that a token passes."""
    from benchmarks.gpu.bench import ratio, spread

    rows, length = (2, 64) if bench.tiny else (64, 512)
    config = bench.shape("moe")
    wide = config.moe_intermediate_size * (config.num_experts_per_tok + config.num_shared_experts)
    dense = bench.shape("small", **({} if bench.tiny else _like(config, wide)))
    data = bench.rows(rows * 8, length, config.vocab_size, 200)
    steps = {}
    for name, shape in (("moe", config), ("dense", dense)):
        steps[name] = bench.step_of(bench.engine(bench.model(shape), data, rows, length))
        for _ in range(1 if bench.tiny else 3):
            steps[name]()
    times = bench.in_turns(steps)
    return dict(
        about=f"{rows} x {length} tokens; moe against a dense model of the same active size, {wide} wide",
        **{f"{name} tokens/s": spread([rows * length / t for t in own]) for name, own in times.items()},
        share=ratio(times, "moe", "dense"),
    )


def _like(config, wide: int) -> dict:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name) for name in names} | dict(intermediate_size=wide)


def lora(bench: Bench) -> dict:
    """Rank 8 on all linear layers of a model with the shape of Qwen2.5-0.5B; peft on the same, if it is there."""
    import torch

    from benchmarks.common import hugging_face_llama, hugging_face_step
    from benchmarks.gpu.bench import ratio, spread
    from model.lora import LoRASettings, add_lora, freeze

    rows, length = (2, 64) if bench.tiny else (8, 1024)
    qwen = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, head_dim=64)
    qwen |= dict(intermediate_size=4864, vocab_size=151_936, max_position_embeddings=32768)
    config = bench.shape("small", **(dict(vocab_size=2000) if bench.tiny else qwen))
    model = bench.model(config)
    steps, has_peft = {}, importlib.util.find_spec("peft") is not None
    if has_peft:
        import peft

        model.to(bench.device)
        theirs, _ = hugging_face_llama(model)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(theirs.to(bench.dtype), settings).train()
        trained = [p for p in theirs.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    freeze(model)
    add_lora(model, LoRASettings(rank=8))
    engine = bench.engine(model, bench.rows(rows * 8, length, config.vocab_size), rows, length)
    steps["ours"] = bench.step_of(engine)
    if has_peft:
        batch = engine.loader.batches(0)[0].to(bench.device)
        steps["peft"] = lambda: hugging_face_step(theirs, optimizer, batch, bench.dtype == torch.bfloat16)
    peaks = {f"{name} peak GiB, both models there": bench.peak(step) for name, step in steps.items()}
    times = bench.in_turns(steps)
    numbers = {f"{name} tokens/s": spread([rows * length / t for t in own]) for name, own in times.items()}
    numbers["times as fast"] = ratio(times, "ours", "peft") if has_peft else "no peft here"
    return dict(about=f"Qwen2.5-0.5B's shape, {rows} x {length} tokens", **numbers, **peaks)


def decode(bench: Bench) -> dict:
    """Tokens per second of greedy answers: one stream, 64 streams, one without graphs, and transformers' generate."""
    import torch

    from benchmarks.common import hugging_face_llama
    from benchmarks.gpu.bench import spread
    from inference.engine import Engine, Request
    from inference.sampling import Sampling
    from model.precision import prepare_for_inference

    new = 8 if bench.tiny else 128
    model = bench.model(bench.shape("small"))
    theirs = hugging_face_llama(model)[0].to(bench.device, bench.dtype).eval()
    model = prepare_for_inference(model, bench.dtype).to(bench.device)
    prompt = list(range(100, 132))
    request = Request(prompt, Sampling(temperature=0), new)
    engines = {name: Engine(model, rows, len(prompt) + new) for name, rows in (("all", 64), ("plain", 1))}
    engines["plain"].graphs = None

    def ours(streams: int, engine: str = "all") -> None:
        for _ in range(streams):
            engines[engine].submit(request)
        while engines[engine].busy:
            engines[engine].step()

    ids = torch.tensor([prompt], device=bench.device)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    sides = {"one stream": lambda: ours(1), "64 streams": lambda: ours(64)}
    sides["one stream without graphs"] = lambda: ours(1, "plain")
    sides["transformers, one stream"] = lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for work in sides.values():
        work()
    times = bench.in_turns(sides, steps=1)
    count = lambda name: 64 * new if name == "64 streams" else new
    found = {f"{name}, tokens/s": spread([count(name) / t for t in own]) for name, own in times.items()}
    return dict(about=f"small, {len(prompt)} tokens of prompt, {new} new ones", **found)


def memory(bench: Bench) -> dict:
    """`--plan` against the run itself: `small`, 32 x 512, both in processes of their own."""
    import re
    import subprocess

    from common.files import ROOT

    flags = ["--preset=nano", "--batch_size=4", "--max_seq_len=64"] if bench.tiny else ["--preset=small"]
    flags += ["--max_steps=12", "--val_limit=256", "--compile=off", f"--device={bench.device.type}"]
    command = [sys.executable, str(ROOT / "trainer/train_pretrain.py"), *flags, f"--cache_dir={bench.folder}"]

    def run(place: str, *more: str) -> str:
        words = [*command, f"--save_dir={bench.folder}/{place}", *more]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    planned = float(re.search(r"memory +([\d.]+) GiB", run("plan", "--plan"))[1])
    run("run")
    (summary,) = Path(bench.folder, "run", "runs").glob("*/run.json")
    real = json.loads(summary.read_text(encoding="utf-8"))["summary"]["memory_gib"]
    return {"planned GiB": planned, "real GiB": real, "planned / real": planned / real}


def head(bench: Bench) -> dict:
    """The peak of a step with 151,936 words, the head in chunks and all at once: benchmarks/head_memory.py."""
    import subprocess

    from common.files import ROOT

    size = ["--vocab_size=2000", "--length=64"] if bench.tiny else []
    flags = [f"--device={bench.device.type}", f"--dtype={str(bench.dtype).removeprefix('torch.')}", *size]
    command = [sys.executable, str(ROOT / "benchmarks/head_memory.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return dict(result=done.stdout.splitlines()[-1]) if done.returncode == 0 else dict(error=done.stderr[-500:])


def dpo(bench: Bench) -> dict:
    """Pairs per second, with the model without its adapter as the reference."""
    from benchmarks.gpu.bench import spread
    from dataset.batches.preference import PairLoader, PreferenceDataset
    from model.lora import LoRASettings, add_lora, freeze
    from tokenizer.text import Tokenizer
    from trainer.losses.preference import Preference

    path = bench.world("dpo")
    length, pairs = (64, 4) if bench.tiny else (512, 64)
    data = PreferenceDataset(path, Tokenizer.load(), max_seq_len=length, cache_dir=bench.folder)
    model = bench.model(bench.shape("small"))
    freeze(model)
    add_lora(model, LoRASettings(rank=8))
    engine = bench.engine(
        model, data, pairs, length, "--compile=off", objective=Preference("sigmoid"), packing=True, loader=PairLoader
    )
    step = bench.step_of(engine)
    first = bench.seconds(lambda: [step() for _ in range(1 if bench.tiny else 4)])
    times = bench.in_turns(dict(ours=step))["ours"]
    return dict(about=f"small, {pairs} pairs a step", **{"pairs/s": spread([pairs / t for t in times])}, first=first)


def distillation(bench: Bench) -> dict:
    """Trained tokens per second of a student, from a file of its teacher's log-probabilities and from the teacher."""
    from benchmarks.gpu.bench import spread
    from common.options import parse
    from dataset.tokens.teacher import TaughtDataset, read_header
    from model.checkpoint import Checkpoint
    from tokenizer.text import Tokenizer
    from trainer.inputs import Data
    from trainer.loop.backend import Backend
    from trainer.losses.distillation import Distill, Teacher, write_logprobs
    from trainer.train_distillation import DistillationConfig

    place, tokenizer = Path(bench.folder) / "teacher.lp", Tokenizer.load()
    path = bench.world("sft")
    count, length, rows = (8, 128, 64) if bench.tiny else (128, 512, 4096)
    options = dict(max_seq_len=length, cache_dir=bench.folder, data_limit=rows)
    large = bench.shape("base")
    teacher = Teacher(Checkpoint(place, bench.model(large).state_dict(), large), bench.dtype, bench.device)
    flags = [f"--write_logprobs={place}", "--teacher=base", f"--batch_size={count}", f"--max_seq_len={length}"]
    config, data = parse(DistillationConfig, flags), Data(TaughtDataset(path, tokenizer, **options), None, False, [])
    writing = bench.seconds(lambda: write_logprobs(config, data, tokenizer, teacher, Backend(bench.device)))
    header, trained, steps = read_header(place), 0, {}
    for name, asked in (("file", None), ("teacher", teacher)):
        data = TaughtDataset(path, tokenizer, header=None if asked else header, **options)
        objective = Distill("forward_kl", config.temperature, config.alpha, tokenizer.vocab_size, asked)
        student = bench.model(bench.shape("small"))
        engine = bench.engine(student, data, count, length, "--compile=off", objective=objective, packing=True)
        steps[name], batches = bench.step_of(engine), [b for s in range(4) for b in engine.loader.batches(s)]
        trained = sum(b.trained_tokens for b in batches) / 4
        steps[name]()
    peaks = {f"{name} peak GiB": bench.peak(step) for name, step in steps.items()}
    times = bench.in_turns(steps)
    return dict(
        about=f"a base teaches a small, {count} short chats a step, {trained:,.0f} trained tokens a step",
        **{f"{name}, trained tokens/s": spread([trained / t for t in own]) for name, own in times.items()},
        **peaks,
        **{"writing the file, tokens/s": header["tokens"] / writing, "bytes a token": header["bytes_per_token"]},
    )


def loop(bench: Bench) -> dict:
    """What logging every 10 steps costs, and whether a step waits for the card anywhere."""
    import torch

    rows, length, steps = (2, 64, 4) if bench.tiny else (32, 512, 60)
    config = bench.shape("small")
    data = bench.rows(rows * 8, length, config.vocab_size)
    seconds = {}
    for interval in (100_000, 10, 100_000, 10):
        flags = [f"--max_steps={steps}", f"--log_interval={interval}", "--compile=off"]
        engine = bench.engine(bench.model(config), data, rows, length, *flags)
        engine.save = lambda: None
        engine._finish = lambda: None
        for batches in (engine.loader.batches(0), engine.loader.batches(1)):
            engine.train_step(batches)
        seconds.setdefault(interval, []).append(bench.seconds(engine.run))
    found = {"seconds, logging every 10": min(seconds[10]), "seconds, logging at the end": min(seconds[100_000])}
    found["share"] = min(seconds[10]) / min(seconds[100_000]) - 1
    if bench.cuda:
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.train_step(engine.loader.batches(2))
            found["waits in a step"] = "none"
        except RuntimeError as error:
            found["waits in a step"] = str(error)[:200]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


PARTS = {
    "facts": Part(facts, 60),
    "device": Part(device, 60),
    "small": Part(small, 120),
    "base": Part(base, 120),
    "sft": Part(sft, 120),
    "head": Part(head, 60),
    "moe": Part(moe, 120),
    "lora": Part(lora, 120),
    "decode": Part(decode, 60),
    "memory": Part(memory, 120),
    "distillation": Part(distillation, 90),
    "loop": Part(loop, 60),
    "dpo": Part(dpo, 90),
}
QUICK = ("facts", "device", "small", "base", "sft")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS))
    args = parser.parse_args()

    import torch

    from benchmarks.gpu.bench import Bench

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.device, args.tiny, args.quick, folder)
        for name in args.parts:
            print(f"BEGIN {name}", flush=True)
            try:
                result = PARTS[name].run(bench)
            except Exception as error:  # the others are measured all the same
                traceback.print_exc()
                result = dict(error=f"{type(error).__name__}: {error}"[:500])
            print(f"END {name} {json.dumps(result)}", flush=True)
            torch._dynamo.reset()
            gc.collect()
            if bench.cuda:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
