"""What a stage needs before it can start: data, weights to start from, and the tokenizer of both."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import UserError, check_writable, ran_out_of_memory, takes_colour
from common.files import ROOT
from dataset.read.hub import KNOWN, find_data
from dataset.read.mapping import read_mapping
from dataset.tiny_world import files as tiny_world
from dataset.tokens.examples import TokenDataset
from model.checkpoint import Checkpoint, check_stated, open_weights
from model.config import MIXTURE, PRESETS, ModelConfig, architecture_options
from model.cost import count_parameters
from model.hub import load_tokenizer
from model.precision import pick_device, pick_dtype
from model.resize import add_tokens
from model.transformer import CausalLM
from tokenizer.chat import show_labels
from tokenizer.text import Tokenizer
from trainer.stage import StageConfig

# The files of MiniMind's data set as people keep them in dataset/, best first. Of other kinds: dataset/<kind>.jsonl
WELL_KNOWN = {
    "pretrain": ("pretrain_hq", "pretrain"),
    "dpo": ("dpo",),
    "sft": ("sft_mini_512", "sft_512", "sft_1024", "sft_2048", "sft"),
    "reason": ("r1_mix_1024", "reason"),
}
SHOWN = 5  # files of --data_path that are listed; a data set can have thousands


class Data(NamedTuple):
    train: TokenDataset
    val: TokenDataset | None
    builtin: bool  # whether it is the tiny world, because there is no other
    notes: list[str]  # lines to print


def choose_files(config: StageConfig, kind: str) -> tuple[tuple[str, ...], bool, str]:
    """(files, whether built in, a line that says why these): what was typed, a well-known file, else the tiny world."""
    if config.data_path:
        paths = tuple(map(find_data, config.data_path))
        more = f" and {n - SHOWN:,} more" if (n := len(paths)) > SHOWN else ""
        return paths, False, f"data: {', '.join(paths[:SHOWN])}{more}"
    names = WELL_KNOWN.get(kind, (kind,))
    for name in names:
        path = ROOT / "dataset" / f"{name}.jsonl"
        if path.is_file():
            return (str(path),), False, f"data: {path} (--data_path names another)"
    real = f"python scripts/download.py {names[0]}" if names[0] in KNOWN else ""
    if kind not in tiny_world.FILES:
        fetched = f"; {real} fetches it" if real else ""
        raise UserError(
            f"--data_path is needed: there is no dataset/{kind}.jsonl, and the tiny world has no {kind}{fetched}"
        )
    path = tiny_world.generate(ROOT / "out" / "tiny_world", files=(kind,))[kind]
    note = f"data: the built-in tiny world ({path}), enough to see everything work"
    return (str(path),), True, f"{note}. Real data: {real}" if real else note


def open_data(dataset, config: StageConfig, kind: str, tokenizer: Tokenizer, **options) -> Data:
    """Reads (or finds in the cache) what the stage trains on and validates with. kind: a key of WELL_KNOWN, or
    the name of a file in dataset/."""
    check_writable(config.save_dir)
    paths, builtin, note = choose_files(config, kind)
    options |= dict(
        max_seq_len=config.max_seq_len,
        cache_dir=config.cache_dir,
        num_workers=config.num_workers or None,
        on_bad_row=config.on_bad_row,
        max_bad_rows=config.max_bad_rows,
        max_empty_rows=config.max_empty_rows,
        seed=config.seed,
        mapping=read_mapping(config.data_mapping),
    )
    train: TokenDataset = dataset(paths, tokenizer, data_limit=config.data_limit, **options)
    notes, val = [note, f"      {train.summary}", *warn_of_lost_rows(train, config.max_seq_len)], None
    notes += random_reads(train.stored_bytes)
    if config.val_path:
        paths = tuple(map(find_data, config.val_path))
        val = dataset(paths, tokenizer, **options)
        notes.append(f"validation: {', '.join(paths)}: {val.summary}")
        notes += warn_of_known_rows(train, val)
    elif config.val_fraction:
        train, val = train.split(config.val_fraction, config.seed)
        notes.append(f"validation: {val.summary}")
    if val is not None and 0 < config.val_limit < len(val):
        val = val.view(np.linspace(0, len(val) - 1, config.val_limit).astype(int), f"{config.val_limit} rows")
        notes.append(f"            {config.val_limit:,} of them, evenly spread (--val_limit)")
    for i in range(min(config.show_labels, len(train))):
        notes.append(f"--- {train.source(i)}")
        for tokens, trained in train.sequences(i):
            targets = [True] * len(tokens) if trained is None else [*trained]
            targets[0] = False  # nothing predicts it
            notes.append(show_labels(tokenizer, tokens, targets, colours=takes_colour(sys.stdout)))
    return Data(train, val, builtin, notes)


def warn_of_known_rows(train: TokenDataset, val: TokenDataset) -> list[str]:
    """A line for each file that is validated with and trained on."""
    known = {file["sha256"] for file in train.files}
    return [
        f"warning: {file['path']} is trained on too, so val_loss says nothing about new text; --val_fraction holds "
        "rows out"
        for file in val.files
        if file["sha256"] in known
    ]


def random_reads(size: int) -> list[str]:
    """A line of advice if `size` bytes of tokens do not fit into the main memory: then a disk is read at random."""
    if not hasattr(os, "sysconf"):  # Windows
        return []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size <= memory:
        return []
    return [
        f"note: {size / 1e9:,.1f} GB of tokens do not fit into {memory / 1e9:,.1f} GB of memory, so rows are read from "
        "the disk at random: keep them on an SSD (--cache_dir), not on a hard disk or a network drive"
    ]


def warn_of_lost_rows(train: TokenDataset, max_seq_len: int) -> list[str]:
    """A line if more than a tenth of the examples is left out because of their length."""
    lost, total, longest = train.too_long
    if lost <= total / 10:
        return []
    return [
        f"warning: {lost:,} of {total:,} rows ({lost / total:.0%}) are left out, too long for --max_seq_len "
        f"{max_seq_len}; the longest needs {longest}, and scripts/check_data.py suggests a length"
    ]


def architecture(config: StageConfig, tokenizer: Tokenizer, preset: str) -> ModelConfig:
    """Of a fresh model: a preset, changed by the flags that are given."""
    flags = [name for name, *_ in architecture_options()]
    changes = {name: value for name in flags if (value := getattr(config, name, None)) is not None}
    if config.use_moe and preset != "moe":
        changes |= MIXTURE
    return ModelConfig.preset(preset, vocab_size=tokenizer.vocab_size, **changes)


def check_start(config: StageConfig, parent: Checkpoint | None, outputs: list[Path]) -> None:
    """UserError if the run would write over the weights it starts from. outputs: the files that it will write."""
    for path in outputs:  # written over, the parent is gone, and the run could not be continued
        if parent and Path(parent.path).resolve() == path.resolve():
            raise UserError(
                f"{path}: this run starts from these weights and would write over them; give its own another name with "
                f"--save_weight, {config.save_weight}_2 for instance"
            )


def check_positions(config: StageConfig, shape: ModelConfig, whose: str) -> None:
    most = shape.max_position_embeddings
    if config.max_seq_len > most:
        raise UserError(
            f"--max_seq_len {config.max_seq_len}: {whose} is made for {most} positions, and is never asked for more; "
            "lower it, or give a fresh model a larger --max_position_embeddings"
        )


def open_model(
    config: StageConfig, kind: str, weights: str | None, required: Tokenizer | None
) -> tuple[Checkpoint | None, CausalLM, Tokenizer, str]:
    """The model that is trained -> (weights it starts from, model, its tokenizer, a line to print).

    --from_weight, or what is called `weights`; a fresh model, and no checkpoint, where neither is given.
    kind      of data: on the tiny world a fresh model is small
    required  the tokenizer of the teacher; weights that have another one are refused
    """
    wanted = config.from_weight or weights
    if wanted is None:
        tokenizer = required or load_tokenizer(config.tokenizer_path)
        preset = config.preset or ("nano" if choose_files(config, kind)[1] else "small")
        return None, build_fresh(architecture(config, tokenizer, preset)), tokenizer, f"from: a fresh {preset}"
    parent, tokenizer, origin = open_parent(config, wanted, required)
    model = build_parent(config, parent)
    if config.resize_vocab and tokenizer.vocab_size > model.config.vocab_size:
        add_tokens(model, tokenizer.vocab_size)
        added = model.config.vocab_size - parent.config.vocab_size
        origin += f"\n      with {added:,} more tokens, whose rows begin at the mean of the others (--resize_vocab)"
    return parent, model, tokenizer, origin


def build_fresh(shape: ModelConfig) -> CausalLM:
    try:
        return CausalLM(shape)
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            size = count_parameters(shape)
            raise UserError(
                f"out of memory: the model would have {size:,} parameters, {4 * size / 2**30:,.0f} GiB; lower "
                f"--hidden_size (now {shape.hidden_size}) or --num_hidden_layers (now {shape.num_hidden_layers})"
            ) from error
        raise


def build_parent(config: StageConfig, parent: Checkpoint) -> CausalLM:
    """The model to train, on its device. What an adapter leaves frozen is kept in the compute dtype, or in 4 or 8
    bits."""
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype = pick_dtype(config.dtype, device)[0] if config.trains_adapter else None
    try:
        return parent.build(dtype, config.bits, device)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        way = "" if config.bits == 4 else "; --use_lora --load_in_4bit keeps most weights in half a byte each"
        raise UserError(
            f"out of memory: the weights of {parent.path} alone do not fit into {device}{way}. See what else is in its "
            "memory (nvidia-smi), or take a smaller model"
        ) from error


def open_parent(
    config: StageConfig, wanted: str, required: Tokenizer | None = None
) -> tuple[Checkpoint, Tokenizer, str]:
    """The weights to start from, their tokenizer, and a line to print. required: as in `open_model`."""
    folders = [config.save_dir, ROOT / "out"]
    if wanted == config.save_weight and Path(config.save_dir).resolve() != (ROOT / "out").resolve():
        folders.reverse()  # the one in save_dir is what this very command wrote the last time
    stated = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "use_moe")}
    path = None if config.resize_vocab else config.tokenizer_path  # of a smaller one, which the new one continues
    parent, tokenizer = open_weights(wanted, *folders, tokenizer_path=path, **stated)
    if config.resize_vocab:
        larger = load_tokenizer(config.tokenizer_path)
        if not larger.continues(tokenizer):
            raise UserError(
                f"--resize_vocab: {larger.path} does not continue {tokenizer.path}, the tokenizer of {parent.path}: "
                "ids that the weights know would stand for other text; only add tokens, after the last id"
            )
        tokenizer = larger
    if required and not tokenizer.same_ids(required):
        raise UserError(
            f"--teacher {config.teacher}: its tokenizer ({required.path}, {required.vocab_size:,} ids) is not that of "
            f"{parent.path} ({tokenizer.path}, {tokenizer.vocab_size:,} ids); distillation needs the same in both"
        )
    if config.preset:
        own = {k: v for k, v in PRESETS[config.preset].items() if stated.get(k) is None}
        check_stated(parent, f"--preset {config.preset}", **own)
    stages = " -> ".join(entry["stage"] for entry in parent.lineage)
    return parent, tokenizer, f"from: {parent.path}" + (f" ({stages})" if stages else "")
