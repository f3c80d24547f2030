"""Models to compare or to look into, by what people call them: a name, a file, a directory, or an adapter on its base.

    models = open_models(["full_sft", "lora_medical", "lora_identity"], "out")
    with models[1].active() as model:
        ...                                     # computes with the adapter lora_medical

Adapters on the same weights share them: the base is in memory once, and `active()` switches to the one that is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from common.console import UserError, note
from common.files import ROOT, relative_to_root
from evaluation.lineage import History, history_of
from evaluation.measure import with_system
from inference.answers import prompt_ids
from model.adapter import AdapterFile, find_base, open_model_file
from model.checkpoint import Checkpoint, find_tokenizer, find_weights, same_weights
from model.lora import activate, adapted
from model.precision import pick_device, pick_dtype, prepare_for_inference
from model.quant_cpu import quantize_for_cpu
from model.transformer import CausalLM
from tokenizer.text import Tokenizer


@dataclass
class Contender:
    """A model that is compared: weights, or an adapter on weights that other contenders may share."""

    name: str  # unique among those opened together
    model: CausalLM
    adapter: str | None  # the name it has in the model; None: the weights as they are
    tokenizer: Tokenizer
    history: History
    bytes: int  # of the files: weights, and the adapter's with them

    @contextmanager
    def active(self) -> Iterator[CausalLM]:
        """The model, computing with this contender's adapter, or with none."""
        activate(self.model, self.adapter)
        yield self.model

    @property
    def completes(self) -> bool:
        """Whether it continues a text instead of answering: it was pretrained and nothing else."""
        return [stage.get("stage") for stage in self.history.stages][-1:] == ["pretrain"]

    def encode(self, prompt: str | list[dict], system: str = "", tools: list[dict] | None = None) -> list[int]:
        """The ids that the answer to a message, or to a conversation, continues."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.completes:
            return prompt_ids(self.tokenizer, messages[-1]["content"])
        return prompt_ids(self.tokenizer, with_system(messages, system), tools)

    def facts(self) -> dict:
        """Size and shape, as plain values."""
        config, layers = self.model.config, adapted(self.model).values()
        own = [layer.adapter(self.adapter) for layer in layers if self.adapter and self.adapter in layer.adapters]
        added = sum(p.numel() for layer in layers for p in layer.adapters.parameters())
        return dict(
            name=self.name,
            path=relative_to_root(self.history.path),  # reports are handed on: no names of home directories
            base=self.history.base,
            parameters=self.model.num_parameters() - added + sum(p.numel() for a in own for p in a.parameters()),
            adapter_parameters=sum(p.numel() for a in own for p in a.parameters()),
            bytes=self.bytes,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            experts=config.num_experts,
            vocab_size=config.vocab_size,
            dtype=str(self.model.model.embed_tokens.weight.dtype).removeprefix("torch."),
            device=str(self.model.model.embed_tokens.weight.device),
        )


def locate(weight: str, save_dir: str | Path) -> Path:
    """The file or directory of weights or of an adapter; a bare name is looked up in save_dir and out/, and below."""
    folders = (Path(save_dir), ROOT / "out")
    try:
        return find_weights(weight, *folders)
    except UserError:
        with suppress(UserError):  # scripts/lora_quickstart.py writes into a folder of the adapter's name
            return find_weights(weight, *(folder / "lora" for folder in (*folders, *(f / weight for f in folders))))
        raise  # what there is among the weights is the thing to say


def open_models(
    weights: list[str],
    save_dir: str | Path,
    *,
    tokenizer_path: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> list[Contender]:
    """Loads what is named, in that order. Weights that several share are loaded once.

    An adapter that does not say which weights it belongs to is put on the first weights among `weights`.
    """
    on = pick_device(device)
    precision, remark = pick_dtype(dtype, on)
    if remark:
        note(remark)
    paths = [locate(weight, save_dir) for weight in weights]
    files = [open_model_file(path) for path in paths]
    named = next((file for file in files if isinstance(file, Checkpoint)), None)
    opened: list[tuple[Checkpoint, CausalLM, Tokenizer]] = []
    contenders: list[Contender] = []
    for file, name in zip(files, _names(weights, paths)):
        history = history_of(file, save_dir, ROOT / "out")
        base, model, tokenizer = _open_base(
            file, named, opened, (save_dir, ROOT / "out"), tokenizer_path, precision, on
        )
        adapter, size = None, _bytes(base.path)
        if isinstance(file, AdapterFile):
            adapter, size = f"adapter{len(contenders)}", size + _bytes(file.path)
            file.apply(model, adapter)
            history.base = history.base or str(base.path)
            note(f"{file.path}: rank {file.settings.rank}, on its base {base.path}{file.kept(None)}")
        contenders.append(Contender(name, model, adapter, tokenizer, history, size))
    for _, model, _ in opened:
        activate(model, None)
        prepare_for_inference(model, precision).to(on)
        if quantize:
            note(quantize_for_cpu(model, quantize))
    return contenders


def base_of(weight: str, save_dir: str | Path) -> str:
    """The path of the weights that an adapter was trained on. UserError if `weight` is no adapter."""
    file = open_model_file(locate(weight, save_dir))
    if isinstance(file, Checkpoint):
        raise UserError(f"{file.path}: are weights, not an adapter; say with --base_model what to compare them with")
    return str(find_base(file, None, save_dir, ROOT / "out").path)


def _open_base(
    file: Checkpoint | AdapterFile,
    named: Checkpoint | None,
    opened: list[tuple[Checkpoint, CausalLM, Tokenizer]],
    folders: tuple[str | Path, ...],
    tokenizer_path: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Checkpoint, CausalLM, Tokenizer]:
    """The weights that `file` is, or is put on, as a model that may be in `opened` already."""
    if isinstance(file, Checkpoint):
        wanted = file.hash
    else:
        wanted = file.base["hash"] if file.knows_base or named is None else named.hash
    for entry in opened:
        if wanted and same_weights(entry[0].hash, wanted):
            return entry
    if isinstance(file, Checkpoint):
        base = file
    else:
        base = find_base(file, None if file.knows_base or named is None else Path(named.path), *folders)
    entry = base, base.build(dtype, device=device), find_tokenizer(base, tokenizer_path)
    base.release()
    opened.append(entry)
    return entry


def _names(weights: list[str], paths: list[Path]) -> list[str]:
    """Short names, each once: the file's, or as much of its path as tells it from the others."""
    called = ["/".join(Path(weight).parts[-2:]) for weight in weights]  # no names of home directories
    names = [path.name if path.name != "lora_model" else own for own, path in zip(called, paths)]
    names = [name.removesuffix(".pth") for name in names]
    for i, name in enumerate(names):
        if names.count(name) > 1:
            names[i] = f"{paths[i].parent.name}/{name}" if names.index(name) != i else name
    return [f"{name} ({i + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _bytes(path: Path) -> int:
    """Of a weights file, or of the files with tensors in a directory."""
    files = (
        [path] if Path(path).is_file() else [f for f in Path(path).rglob("*") if f.suffix in (".safetensors", ".bin")]
    )
    return sum(os.stat(file).st_size for file in files)
