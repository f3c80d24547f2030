"""What the parts of the GPU benchmark share: the device and the sizes, both sides of a comparison, and the clock."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import RandomRows, hugging_face_llama, hugging_face_step, seconds
from common.options import parse
from dataset.tiny_world import files
from model.config import ModelConfig
from model.cost import step_flops
from model.precision import pick_device, pick_dtype
from model.transformer import CausalLM
from tokenizer.text import Tokenizer
from trainer.inputs import Data
from trainer.loop.backend import Backend
from trainer.loop.compiling import can_compile
from trainer.loop.engine import Engine, Job
from trainer.losses.next_token import NextToken
from trainer.run.meter import gemm_rate
from trainer.train_pretrain import PretrainConfig


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> dict[str, float]:
    """How many times as fast one side is as the other, round by round."""
    return spread([b / a for a, b in zip(times[ours], times[theirs])])


def spread(values: list[float]) -> dict[str, float]:
    return dict(median=statistics.median(values), least=min(values), greatest=max(values))


class Bench:
    """The device, the sizes, and what the parts share."""

    def __init__(self, device: str, tiny: bool, quick: bool, folder: str):
        self.device, self.tiny, self.folder = pick_device(device), tiny, folder  # with its number, as in a run
        self.cuda = self.device.type == "cuda"
        self.rounds = 1 if tiny else 3 if quick else 5
        self.steps = 1 if tiny else 4  # of each side in a round
        self.dtype, _ = pick_dtype("auto", self.device)
        self.compile = "on" if not tiny and can_compile(self.device.type) else "off"  # without a compiler: eager
        self.rate = 0.0  # FLOP/s of matrix products, measured by `facts` or when it is first needed

    # ---- measuring

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        return seconds(work)

    def in_turns(self, sides: dict[str, Callable[[], object]], steps: int | None = None) -> dict[str, list[float]]:
        """Seconds of one step of each side, round by round. steps: of a side in a round."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        steps = steps or self.steps
        for _ in range(self.rounds):
            for name, step in sides.items():
                times[name].append(self.seconds(lambda: [step() for _ in range(steps)]) / steps)  # noqa: B023
        return times

    def gemm(self) -> float:
        if not self.rate:
            size = 256 if self.tiny or not self.cuda else 8192
            self.rate = gemm_rate([(size, size, size)], self.dtype, self.device, repeats=10)
        return self.rate

    def peak(self, work: Callable[[], object]) -> float:
        """GiB of the card at most, in all, while this runs."""
        if not self.cuda:
            work()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**30

    # ---- our side

    def shape(self, preset: str, **changes):
        small = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
        small |= dict(intermediate_size=96) | (dict(moe_intermediate_size=48) if preset == "moe" else {})
        return ModelConfig.preset(preset, **(small if self.tiny else {}), **changes)

    def engine(self, model, data, rows: int, length: int, *flags: str, objective=None, packing=False, **job):
        """As a stage builds it; random weights, none of them zero."""
        place = tempfile.mkdtemp(dir=self.folder)
        config = [f"--save_dir={place}", f"--batch_size={rows}", f"--max_seq_len={length}", "--save_interval=0"]
        config += ["--recipe=classic"]
        config += ["--schedule=constant", "--warmup_steps=0", "--max_steps=100000", f"--device={self.device.type}"]
        config += [f"--compile={self.compile}", "--log_interval=100000", *flags]
        data = data if isinstance(data, Data) else Data(data, None, False, [])
        objective = objective or NextToken()
        job = Job("x", parse(PretrainConfig, config), model, objective, Tokenizer.load(), data, packing=packing, **job)
        engine = Engine(job, Backend(self.device))
        engine.model.train()
        return engine

    def model(self, config):
        torch.manual_seed(0)
        model = CausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    def step_of(self, engine) -> Callable[[], object]:
        """A function that trains the next step; batches are made ahead by the loader's thread, as in a run."""
        batches = engine.loader.prefetch(0, 10**6)

        def step():
            engine._set_learning_rate()
            engine.last = engine.train_step(next(batches)[1])
            engine.step += 1
            return engine.last

        return step

    def world(self, name: str) -> Path:
        """A file of the tiny world."""
        return files.generate(Path(self.folder) / "world", files=(name,))[name]

    def rows(self, count: int, length: int, vocab: int, documents: int = 0):
        """Rows of random tokens; with `documents`, ones of about that many tokens, one after the other."""
        data = RandomRows(count, length, vocab)
        if documents:
            ends = np.random.default_rng(1).random(data._ids.shape) < 1 / documents
            data._ids[ends] = data.end_of_text
        return data

    # ---- the other side

    def theirs(self, engine, batch) -> Callable[[], object]:
        """transformers' Llama of the same weights, in the usual loop: SDPA, autocast, fused AdamW, eager."""
        model, optimizer = hugging_face_llama(engine.model)
        batch, bf16 = batch.to(self.device), self.dtype == torch.bfloat16
        return lambda: hugging_face_step(model, optimizer, batch, bf16)

    def against_transformers(self, preset: str, rows: int, length: int, documents: int) -> dict:
        """Tokens per second of both, the share of the GEMM rate, and seconds until the first step is compiled."""
        rows, length = (2, 64) if self.tiny else (rows, length)
        config = self.shape(preset)
        data = self.rows(rows * 8, length, config.vocab_size, documents)
        engine = self.engine(self.model(config), data, rows, length)
        batch, step = engine.loader.batches(0)[0], self.step_of(engine)
        first = self.seconds(step)
        theirs = self.theirs(engine, batch)
        memory = dict(ours=self.peak(step), theirs=self.peak(theirs))
        for _ in range(0 if self.tiny else 3):
            step(), theirs()
        rate = self.gemm()
        times = self.in_turns(dict(ours=step, theirs=theirs))
        positions, flops = rows * length, step_flops(config, rows * length, length)
        numbers = {f"{name} tokens/s": spread([positions / t for t in own]) for name, own in times.items()}
        numbers["times as fast"] = ratio(times, "ours", "theirs")
        numbers["share of the GEMM rate"] = spread([flops / t / rate for t in times["ours"]])
        numbers["GEMM rate, TFLOP/s"] = rate / 1e12
        numbers |= {f"{name} peak GiB": value for name, value in memory.items()}
        about = f"{preset}, {rows} x {length} tokens, {self.dtype}, documents of about {documents or length} tokens"
        return dict(about=about, **numbers, first_step_seconds=first, kernel=_kernel(engine, batch))


def _kernel(engine, batch) -> str:
    x = engine.model.model.embed_tokens.weight.new_empty(0, dtype=engine.dtype)
    return engine.model._kernel(x, "documents" in batch.context())
