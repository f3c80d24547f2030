"""Adapter files: the matrices of LoRA, and which weights they belong to.

    adapter = load_adapter("out/lora/lora_medical_512.pth")      # also a directory of peft, or a MiniMind file
    base = find_base(adapter, None, "out")                       # the weights it was trained on, found by their hash
    model = adapter.apply(base.build())

`<save_dir>/lora/<name>_<hidden>[_moe].pth` holds {"format", "lora", "settings", "base", "config", "tokenizer",
"lineage", "sha256"}, tensors and plain values. `base` has the path and the hash of the weights it belongs to, and
the bits they were packed to while it was trained, if they were.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console import UserError
from common.files import ROOT
from model.checkpoint import Checkpoint, load_weights, newest, read_plain, same_weights, write_plain
from model.config import ModelConfig
from model.hub import find_path
from model.interop.hf_adapter import our_adapter
from model.interop.minimind import lora_from_minimind
from model.interop.peft import CONFIG as PEFT_CONFIG
from model.interop.peft import load_peft
from model.lora import LoRASettings, activate, adapted, add_lora, linear_layers, lora_state, merge, remove_lora
from model.quant import unpack_model
from model.tensor_files import open_pickled
from model.transformer import CausalLM

FORMAT = "sparrow-lora-1"


@dataclass
class AdapterFile:
    path: Path
    settings: LoRASettings
    state: dict[str, Tensor]  # {"<layer>.A": (r, in), "<layer>.B": (out, r)}
    # of the weights, None: unknown; and "bits" if they were packed while it was trained
    base: dict[str, Any] = field(default_factory=lambda: dict(path=None, hash=None))
    config: ModelConfig | None = None  # of the base
    tokenizer: dict[str, Any] = field(default_factory=dict)
    lineage: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bits(self) -> int | None:
        """4 or 8 if its base was packed, see model/quant.py; None: it was dense, or nobody knows."""
        return self.base.get("bits")

    @property
    def knows_base(self) -> bool:
        return bool(self.base["hash"] or self.base["path"] and Path(self.base["path"]).exists())

    def use_our_names(self, config: ModelConfig) -> None:
        """Takes apart what peft has beside fused layers (GLM, ChatGLM). config: of the base."""
        try:
            self.state = our_adapter(config, self.state)
        except UserError as error:
            raise UserError(f"{self.path}: belongs to another model: {error}") from None

    def apply(self, model: CausalLM, name: str = "default") -> CausalLM:
        """Adds it to the model and activates it."""
        self.use_our_names(model.config)
        known = linear_layers(model)
        layers = list(dict.fromkeys(key.rpartition(".")[0] for key in self.state))
        for layer in layers:
            A, B = (self.state.get(f"{layer}.{matrix}") for matrix in "AB")
            if A is None or B is None:
                raise UserError(f"{self.path}: {layer} has only one of its two matrices")
            if layer not in known:
                raise UserError(f"{self.path}: belongs to another model: this one has no linear layer {layer}")
            shape = known[layer].out_features, known[layer].in_features
            if not (A.isfinite().all() and B.isfinite().all()):
                raise UserError(f"{self.path}: {layer} holds NaN or infinity: the adapter is damaged")
            if (B.shape[0], A.shape[1]) != shape or not A.shape[0] == B.shape[1] == self.settings.rank:
                raise UserError(
                    f"{self.path}: belongs to another model: {layer} is {shape} here, and there "
                    f"{tuple(B.shape)} x {tuple(A.shape)}, of rank {self.settings.rank}"
                )
        add_lora(model, self.settings, name, layers)
        with torch.no_grad():
            for layer, module in adapted(model).items():
                if name in module.adapters:
                    module.adapter(name).A.copy_(self.state[f"{layer}.A"])
                    module.adapter(name).B.copy_(self.state[f"{layer}.B"])
        activate(model, name)
        return model

    def merge_into(self, base: Checkpoint) -> CausalLM:
        """A plain model with the adapter in its weights: the stored ones, in fp32 (for training they were rounded to
        the compute dtype). An adapter that has learned beside packed weights belongs to those, rounding errors
        included: they are unpacked, and all is in bf16."""
        model = self.apply(base.build(torch.bfloat16, self.bits) if self.bits else base.build())
        merge(model)
        remove_lora(model)
        if self.bits:
            unpack_model(model, torch.bfloat16)  # the layers without an adapter
            for parameter in model.parameters():  # the norms; not RoPE's buffers
                parameter.data = parameter.data.bfloat16()
        return model

    def kept(self, bits: int | None) -> str:
        """Words about how its base is kept, after its path. None: dense"""
        if bits == self.bits:
            return f" in {bits} bits, as it was trained" if bits else ""
        trained = f", though it was trained beside {self.bits} bits: answers differ a little" if self.bits else ""
        return (f" in {bits} bits" if bits else "") + trained


def save_adapter(
    path: Path | str,
    model: CausalLM,
    settings: LoRASettings,
    *,
    base: dict[str, Any],
    tokenizer: dict[str, Any],
    lineage: list[dict[str, Any]],
    write: Callable = write_plain,
) -> Path:
    values = dict(settings=settings.to_dict(), base=base, config=model.config.to_dict(), tokenizer=tokenizer)
    values = json.loads(json.dumps(values | dict(lineage=lineage)))  # plain values only, as in weights files
    write(Path(path), dict(format=FORMAT, **values), lora=lora_state(model))
    return Path(path)


def load_adapter(path: Path | str) -> AdapterFile:
    """Reads our file, a directory of peft, or a MiniMind file. Also a directory that contains one of these, such as an
    --output_dir, and the name of one on a hub."""
    path = find_path(path)
    if path.is_dir():
        for folder in (path / "lora", path / "lora_model", path):
            if (folder / PEFT_CONFIG).is_file():
                settings, state, base = load_peft(folder)
                return AdapterFile(folder, LoRASettings(**settings, targets=_last_names(state)), state, base)
            if files := list(folder.glob("*.pth")):
                return load_adapter(newest(files, ""))
        raise UserError(f"{path}: neither a *.pth nor {PEFT_CONFIG} in it, nor in lora/ or lora_model/ below it")
    content = read_plain(path)
    if content.get("format") == FORMAT:
        settings, config = LoRASettings.from_dict(content["settings"]), ModelConfig.from_dict(content["config"])
        return AdapterFile(
            path, settings, dict(content["lora"]), content["base"], config, content["tokenizer"], content["lineage"]
        )
    if found := lora_from_minimind(content):
        settings, state = found
        return AdapterFile(path, LoRASettings(**settings, targets=_last_names(state)), state)
    raise UserError(f"{path}: not an adapter (LoRA) but something else; weights of a model are given as --weight")


def _last_names(state: dict[str, Tensor]) -> tuple[str, ...]:
    """Of the adapted layers, each once: q_proj, v_proj."""
    return tuple(dict.fromkeys(name.split(".")[-2] for name in state))


def find_base(adapter: AdapterFile, named: Path | None, *folders: Path | str) -> Checkpoint:
    """Finds the weights an adapter was trained on by their hash. `named` weights with another hash are an error. An
    adapter that does not record its base (MiniMind's, most of peft's) is put on the named weights; shapes must fit."""
    base = _find_base(adapter, named, *folders)
    base.tokenizer = base.tokenizer or adapter.tokenizer  # MiniMind's weights do not tell theirs
    return base


def _find_base(adapter: AdapterFile, named: Path | None, *folders: Path | str) -> Checkpoint:
    wanted, path = adapter.base["hash"], adapter.base["path"]
    if named is not None:
        found = load_weights(named)
        if wanted and not same_weights(found.hash, wanted):
            raise UserError(
                f"{adapter.path}: was trained on {path} ({wanted[:12]}), not on {found.path} "
                f"({_difference(adapter, found)}); leave the weights out, so that its own are found"
            )
        return found
    if not adapter.knows_base:
        raise UserError(f"{adapter.path}: does not say which weights it belongs to; name them with --weight")
    if not wanted:
        assert path, "else it does not know its base"
        return load_weights(path)
    if found := find_by_hash(wanted, path, *folders, width=adapter.config.hidden_size if adapter.config else None):
        return found
    raise UserError(
        f"{adapter.path}: was trained on {path} ({wanted[:12]}), and these weights are neither there nor in "
        f"{' or '.join(dict.fromkeys(map(str, folders)))}; bring them back, or train the adapter anew on what there is"
    )


def find_by_hash(
    wanted: str, recorded: str | None, *folders: Path | str, width: int | None = None
) -> Checkpoint | None:
    """The weights with this hash: where they were `recorded`, else among the files in `folders`. Weights of another
    `width` are not theirs; files with it in their name are looked at first. None: nowhere."""
    places = [ROOT / recorded] if recorded else []
    likely = f"*_{width}*.pth" if width else "*.pth"
    for names in (likely, "*.pth"):
        for folder in map(Path, folders):
            for own in (folder, folder / "best"):
                places += sorted(own.glob(names))
    for place in dict.fromkeys(places):
        if place.exists():
            try:
                if not _may_be(place, wanted):
                    continue
                found = load_weights(place)
            except ValueError:  # a damaged file among others: go on looking
                continue
            if width in (None, found.config.hidden_size) and same_weights(found.hash, wanted):
                return found
    return None


def _may_be(place: Path, wanted: str) -> bool:
    """By the hash of the tensors that stands in a file: only one with the right one is read as a whole."""
    if place.suffix != ".pth":
        return True
    content = open_pickled(place)
    hashes = content.get("sha256") if isinstance(content, dict) else None
    recorded = hashes.get("model") if isinstance(hashes, dict) else None
    return recorded in (None, wanted.partition(".")[0])


def open_model_file(path: Path | str) -> Checkpoint | AdapterFile:
    """Weights, or an adapter: whatever the file or folder holds. Weights come first in a folder that has both."""
    try:
        return load_weights(path)
    except UserError:
        with suppress(ValueError):
            return load_adapter(path)
        raise  # neither: what is wrong with it as weights is the thing to say


def _difference(adapter: AdapterFile, found: Checkpoint) -> str:
    """How weights that are not the adapter's differ from those that are."""
    numbers, _, _ = found.hash.partition(".")
    if not str(adapter.base["hash"]).startswith(numbers):
        return numbers[:12]
    theirs, ours = (adapter.config or found.config).to_dict(), found.config.to_dict()
    changed = [f"{k} was {theirs.get(k)}, is {ours.get(k)}" for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    return "the same numbers with another config" + (f": {', '.join(changed)}" if changed else "")
