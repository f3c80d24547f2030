"""The table of what is served: names that a request may give as `model`, and what answers under them.

Only what is in the table can be asked for, and a request never names a file. Adapters on one base share its weights.
Each name has an engine of its own; engines take turns, step by step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.console import UserError
from inference.engine import Engine
from model.adapter import AdapterFile, find_base, load_adapter
from model.checkpoint import Checkpoint, check_stated, find_tokenizer, find_weights, load_weights, same_weights
from model.lora import activate
from model.precision import pick_device, pick_dtype, prepare_for_inference
from model.quant import choose_bits
from model.quant_cpu import quantize_for_cpu
from model.transformer import CausalLM
from tokenizer.text import Tokenizer

# what clients of MiniMind's server write; they mean the model that is served
DEFAULTS = ("minimind", "minimind-local:latest", "model-identifier", "default")


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file, or a directory of files, was written again. Made before the file is read."""

    path: Path
    found: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> Stamp:
        return cls(path, _stat(path))

    @property
    def created(self) -> int:
        """in seconds since 1970"""
        return self.found[0] // 10**9

    @property
    def changed(self) -> bool:
        try:
            return _stat(self.path) != self.found
        except OSError:  # it is not there: nothing to load instead
            return False


def _stat(path: Path) -> tuple[int, ...]:
    stats = [file.stat() for file in ([path, *sorted(path.iterdir())] if path.is_dir() else [path])]
    return (max(stat.st_mtime_ns for stat in stats), *(n for stat in stats for n in (stat.st_ino, stat.st_size)))


@dataclass(frozen=True)
class Served:
    name: str
    engine: Engine
    tokenizer: Tokenizer
    base: str | None  # of an adapter: the name of the model it is on, if that is served too
    created: int  # when its file was written, in seconds since 1970
    file: Stamp | None = None  # that it was read from; of an adapter, its own

    @property
    def changed(self) -> bool:
        """Whether its file was written again since, by another training."""
        return self.file is not None and self.file.changed


class Base:
    """Weights that one model or several adapters compute with."""

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: torch.dtype, bits: int | None, device: torch.device
    ):
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.hash, self.bits = checkpoint.hash, bits
        self.model: CausalLM = checkpoint.build(dtype, bits, device)
        checkpoint.release()
        self.parameters = self.model.num_parameters()  # without those of the adapters that are added
        self.active: str | None = None
        self.name: str | None = None  # under which it is served without an adapter

    def add(self, adapter: AdapterFile, name: str) -> None:
        adapter.apply(self.model, name)
        self.active = name

    def switch(self, name: str | None) -> Callable[[], None]:
        """What an engine calls before each step."""

        def use() -> None:
            if self.active != name:
                activate(self.model, name)
                self.active = name

        return use


def load_table(
    weights: list[str],
    adapters: list[str],
    folders: tuple[Path, ...],
    *,
    rows: int,
    max_seq_len: int,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    prompt_lookup_num_tokens: int = 0,
    four: bool | None = None,
    eight: bool | None = None,
    tokenizer_path: str | None = None,
    **stated,
) -> tuple[dict[str, Served], list[str]]:
    """-> (table, remarks to print).

    weights, adapters  each `NAME=WHAT` or WHAT; WHAT is a name in the folders, a file or a directory
    four, eight        keep the weights in so many bits; None: if the adapter for which they are loaded was trained so
    stated             hidden_size, use_moe, ...: choose among weights of one name, and must agree with them
    """
    names = [named(entry)[0] for entry in (*weights, *adapters)]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two models are called {double!r}; give one of them another name: OTHER={double}")
    pick = dict(hidden_size=stated.get("hidden_size"), moe=stated.get("use_moe"))
    where = pick_device(device)
    kind, remark = pick_dtype(dtype, where)
    remarks = [remark] if remark else []
    bases: list[Base] = []
    plan: list[tuple[str, Base, str | None, Stamp]] = []  # (name, base, adapter, its file)

    def base_of(checkpoint: Checkpoint, trained: int | None = None) -> Base:
        for base in bases:
            if same_weights(base.hash, checkpoint.hash):
                return base
        check_stated(checkpoint, **stated)
        bits = choose_bits(four, eight, trained)
        bases.append(Base(checkpoint, find_tokenizer(checkpoint, tokenizer_path), kind, bits, where))
        return bases[-1]

    for entry in weights:
        name, what = named(entry)
        path = find_weights(what, *folders, **pick)
        stamp = Stamp.of(path)
        base = base_of(load_weights(path))
        base.name = base.name or name
        plan.append((name, base, None, stamp))
    for entry in adapters:
        name, what = named(entry)
        places = [folder / "lora" for folder in folders] + [folder / what for folder in folders]
        path = Path(what) if Path(what).exists() else find_weights(what, *places, **pick)
        stamp = Stamp.of(path)
        adapter = load_adapter(path)
        known = [base for base in bases if same_weights(base.hash, adapter.base["hash"])]
        if not known and not adapter.knows_base and len(bases) == 1:
            known = bases  # MiniMind's and peft's adapters often do not say; shapes must fit
        if known:
            base = known[0]
        else:
            base = base_of(find_base(adapter, None, *folders), adapter.bits)
        if adapter.bits and base.bits != adapter.bits:
            remarks.append(
                f"{name}: was trained beside weights in {adapter.bits} bits, here they are in "
                f"{base.bits or 'more'}; --load_in_{adapter.bits}bit keeps them so"
            )
        base.add(adapter, name)
        plan.append((name, base, name, stamp))

    for base in bases:
        base.model = prepare_for_inference(base.model, kind).to(where)
        if quantize:
            remarks.append(f"{base.checkpoint.path}: {quantize_for_cpu(base.model, quantize)}")
    table: dict[str, Served] = {}
    for name, base, adapter, stamp in plan:
        engine = Engine(base.model, rows, max_seq_len, base.switch(adapter), prompt_lookup_num_tokens)
        on = base.name if adapter else None
        table[name] = Served(name, engine, base.tokenizer, on, stamp.created, stamp)
        on = f", the adapter on {base.checkpoint.path}" if adapter else f": {base.checkpoint.path}"
        bits = f" in {base.bits} bits" if base.bits else ""
        remarks.append(f"{name}{on}, {base.parameters / 1e6:.1f}M parameters{bits}")
    return table, remarks


def named(entry: str) -> tuple[str, str]:
    """`NAME=WHAT` -> (NAME, WHAT); a path alone is called like its file or folder, without its size."""
    name, equals, what = entry.partition("=")
    if equals and re.fullmatch(r"[\w.:-]+", name):
        return name, what
    path = Path(entry)
    stem = path.stem if path.suffix == ".pth" else path.name
    return re.sub(r"_\d+(_moe)?$", "", stem) or stem, entry
