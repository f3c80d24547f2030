"""What eval_model.py does with --eval_data and --benchmark: measure, print, and write what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.console import check_writable
from common.files import atomic_file
from evaluation.benchmark import run_benchmark
from evaluation.measure import Measured, Settings, measure
from evaluation.metrics import chosen
from evaluation.report import against, draw, read_json, require_figures, table, write_json
from model.checkpoint import Checkpoint
from model.transformer import CausalLM
from tokenizer.text import Tokenizer


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    config: Any,
    completes: bool,
    write: Callable[[str], None],
) -> None:
    """config: the options of eval_model.py. completes: the model continues texts instead of answering."""
    for flag in ("json", "png"):  # mistakes that would lose the figures show before anything is computed
        if path := getattr(config, flag):
            check_writable(path, f"--{flag}", is_file=True)
    if config.benchmark:
        return take_exam(model, tokenizer, checkpoint, config, write)
    before = read_json(config.against) if config.against else None
    settings = Settings(
        max_new_tokens=config.max_new_tokens or Settings.max_new_tokens,
        sampling=replace(config.sampling(config.seed), temperature=config.temperature or 0),
        window=config.window,
        limit=config.data_limit,
        num_fewshot=config.num_fewshot,
        chats=not completes,
        system=config.system,
        enable_thinking=config.enable_thinking,
    )
    names = chosen(config.metrics)
    results: list[Measured] = []
    try:
        for path in config.eval_data:
            results.append(measure(model, tokenizer, path, names, settings))
    except BaseException:  # a bad row, Ctrl-C: what was found in the files before is not lost
        if results:
            write(table(results) + "\n")
        raise
    require_figures(results, names)
    write(table(results) + "\n")
    if before:
        change = against(results, before, tokenizer.hash)
        write(f"\nchange since {config.against} ({before.get('weights', '?')})\n{change}\n")
    if config.json:
        facts = dict(weights=str(checkpoint.path), lineage=checkpoint.lineage, tokenizer=tokenizer.hash)
        write_json(Path(config.json), results, **facts)
    if config.png:
        draw(Path(config.png), results, Path(str(checkpoint.path)).name)


def take_exam(
    model: CausalLM, tokenizer: Tokenizer, checkpoint: Checkpoint, config: Any, write: Callable[[str], None]
) -> None:
    result = run_benchmark(model, tokenizer, config.question_seed, config.world_seed)
    write(f"{result['table']}\n{result['score']:.1%} of all questions, answered in {result['seconds']} s\n")
    if config.json:
        content = {"weights": str(checkpoint.path), "lineage": checkpoint.lineage, **result}
        with atomic_file(Path(config.json)) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
