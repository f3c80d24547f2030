"""What the benchmarks share: sides measured in turn within one run, medians with their spread, the machine's own limit.

Machines are shared and noisy, so a figure alone says little. Every comparison here runs both sides in the same process
or one after the other, round by round (A B A B ...), and reports ratios of medians.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common.files import atomic_file
from dataset.tokens.examples import TokenDataset
from trainer.run.logger import git_commit

FOLDER = Path("out/benchmarks")  # what `show` writes; in the current directory
_rows: list[dict[str, Any]] = []  # of this program


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux knows more
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        cpu = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), cpu)
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return dict(
        cpu=cpu,
        cores=os.cpu_count(),
        **({"gpus": gpus} if gpus else {}),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        system=platform.platform(),
        commit=git_commit(),
        load=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # of other programs, too
    )


def machine() -> str:
    known = environment()
    load = "" if known["load"] is None else f", load {known['load']}"
    return f"{known['cpu']}, {known['cores']} cores, torch {known['torch']}, {known['threads']} threads{load}"


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def spread(values: list[float]) -> str:
    """Median and, in brackets, the least and the greatest."""
    return f"{statistics.median(values):.4g} [{min(values):.4g} .. {max(values):.4g}]"


def show(name: str, values: float | list[float], unit: str = "", aim: str = "") -> None:
    """Prints a row of the table, and writes the table so far with its environment: <script>.json, .md and .png in
    out/benchmarks.

    values  of the rounds, or a single one
    aim     what was aimed at, in words
    """
    values = [float(value) for value in (values if isinstance(values, list) else [values])]
    median, least, most = statistics.median(values), min(values), max(values)
    shown = spread(values) if len(values) > 1 else f"{median:.4g}"
    print(f"{name:<40} {shown} {unit}".rstrip() + (f"   (aim: {aim})" if aim else ""), flush=True)
    _rows.append(dict(name=name, median=median, least=least, most=most, unit=unit, aim=aim, values=values))
    _write(Path(sys.argv[0]).stem or "benchmark")


def _write(script: str) -> None:
    known = environment()
    content = dict(benchmark=script, command=shlex.join(sys.orig_argv), environment=known, rows=_rows)
    with atomic_file(FOLDER / f"{script}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = [f"# {script}", "", f"`{content['command']}`", ""]
    lines += [f"- {name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in known.items()]
    lines += ["", "| | median | lowest | highest | unit | aim |", "|---|---|---|---|---|---|"]
    for row in _rows:
        figures = " | ".join(f"{row[key]:.4g}" for key in ("median", "least", "most"))
        lines.append(f"| {row['name']} | {figures} | {row['unit']} | {row['aim']} |")
    with atomic_file(FOLDER / f"{script}.md") as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")
    if importlib.util.find_spec("matplotlib"):  # the benchmark for GPUs runs where it may be missing
        with atomic_file(FOLDER / f"{script}.png") as temporary:
            _draw(temporary, script, f"{machine()}, {known['commit']}")


def _draw(path: Path, title: str, remark: str) -> None:
    """A panel for each unit, as their scales differ: bars of the medians, lines from the lowest to the highest."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    units = list(dict.fromkeys(row["unit"] for row in _rows))
    heights = [sum(row["unit"] == unit for row in _rows) for unit in units]
    figure = Figure(figsize=(8, 1 + 0.45 * sum(heights) + 0.6 * len(units)), dpi=120, layout="constrained")
    figure.suptitle(f"{title}\n{remark}", fontsize=8)
    panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=[height + 1 for height in heights])[:, 0]
    for axes, unit in zip(panels, units):
        rows = [row for row in _rows if row["unit"] == unit][::-1]
        far = [[row["median"] - row["least"] for row in rows], [row["most"] - row["median"] for row in rows]]
        axes.barh([row["name"] for row in rows], [row["median"] for row in rows], xerr=far, color="#4c78a8", capsize=3)
        axes.set_xlabel(unit or "ratio")
    figure.savefig(path, format="png")


def engine_step(engine, batches) -> float:
    """One optimiser step as the library's loop makes it, without logging and saving -> its mean loss."""
    engine._set_learning_rate()
    result = engine.train_step(batches)
    engine.step += 1
    return float(result.metrics["loss"]) / result.units


def hugging_face_llama(model):
    """transformers' Llama with the shape and the weights of our model, and the usual optimiser -> (it, optimiser)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        pad_token_id=0,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        tie_word_embeddings=True,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        attn_implementation="sdpa",
    )
    theirs = LlamaForCausalLM(config).train()
    theirs.load_state_dict(model.state_dict())
    theirs.to(model.model.embed_tokens.weight.device)
    named = list(theirs.named_parameters())
    groups = [
        dict(params=[p for n, p in named if p.dim() > 1 and "embed" not in n], weight_decay=0.1),
        dict(params=[p for n, p in named if p.dim() == 1 or "embed" in n], weight_decay=0.0),
    ]
    return theirs, torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.95), fused=True)


def hugging_face_step(model, optimizer, batch, bf16: bool) -> torch.Tensor:
    """One step of a plain loop around a model of transformers -> its loss."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch.tokens).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def data_flags(path: str | None) -> list[str]:
    """For the configuration of a stage, which without a file of one's own takes the tiny world's."""
    return ["--data_path", path] if path else []


class RandomRows(TokenDataset):
    """Rows of random tokens for the engine, where only the time matters."""

    fingerprint, summary, end_of_text, start_of_text, kind = "random", "random rows", 0, 0, "text"

    def __init__(self, rows: int, max_seq_len: int, vocab_size: int):
        import numpy as np

        self.max_seq_len = max_seq_len
        self.order = np.arange(rows)
        self.lengths = np.full(rows, max_seq_len + 1, np.int32)
        self._ids = np.random.default_rng(0).integers(16, vocab_size, (rows, max_seq_len + 1)).astype(np.uint16)

    def _read(self, i):
        return self._ids[i], None

    def _source(self, i):
        return f"random:{i}"
