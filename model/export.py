"""Weights in other programs' formats. scripts/convert.py offers all of them; stages write `save_hf` and `write_peft`.

    save_hf("out/final_model", load_weights("out/full_sft_512.pth"), "tokenizer", stop_ids={2})
    save_minimind("full_sft_512.pth", checkpoint, dtype=torch.float16)

A directory in Hugging Face's layout, which transformers, vLLM and llama.cpp read, has `config.json`,
`generation_config.json`, `*.safetensors` and the tokenizer's files with the chat template.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.console import UserError, note
from common.files import atomic_file
from common.json_file import read_json
from model.adapter import FORMAT as ADAPTER_FORMAT
from model.adapter import AdapterFile
from model.checkpoint import FORMAT, Checkpoint, torch_save, write_plain
from model.config import ModelConfig
from model.interop.gguf import write_gguf
from model.interop.hf import config_to_hf, hf_tensors
from model.interop.hf_adapter import hf_adapter
from model.interop.hf_files import INDEX, SINGLE
from model.interop.minimind import config_to_minimind, lora_to_minimind
from model.interop.ollama import modelfile
from model.interop.peft import save_peft
from model.tensor_files import StoredTensors
from tokenizer.chat import TEMPLATE
from tokenizer.text import IM_START, Tokenizer, read_files

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
GENERATION, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # the names that are written here, and by transformers
SHARD_BYTES = 5_000_000_000  # of one *.safetensors; more is written as several files and an index


def stored_once(config: ModelConfig, state: Mapping[str, Tensor]) -> StoredTensors:
    """Without the head of a tied model, which is the embedding. Nothing is read."""
    places = dict((state if isinstance(state, StoredTensors) else StoredTensors(state)).places)
    if config.tie_word_embeddings and (head := places.pop("lm_head.weight", None)) is not None:
        places.setdefault("model.embed_tokens.weight", head)
    return StoredTensors(places)


def in_memory(tensors: StoredTensors, names: Iterable[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """dtype: None keeps that of each."""
    found = ((name, tensors[name]) for name in names)
    return {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in found}


# ---- Hugging Face's layout


def save_hf(
    directory: Path | str,
    checkpoint: Checkpoint,
    tokenizer: Path | str,
    stop_ids: set[int] | frozenset[int],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """tokenizer: its directory. stop_ids: what ends an answer. dtype: None keeps that of the weights."""
    directory = Path(directory)
    try:
        values = config_to_hf(checkpoint.config)
    except ValueError as error:
        raise UserError(f"{directory}: cannot be written in Hugging Face's layout: {error}") from None
    tensors = stored_once(checkpoint.config, checkpoint.state)
    shards = _shards(tensors, dtype, shard_bytes)
    places, size, kinds = {}, 0, set()
    for n, shard in enumerate(shards):  # one after the other, so that not all of a large model is in memory
        file = SINGLE if len(shards) == 1 else f"model-{n + 1:05}-of-{len(shards):05}.safetensors"
        state = hf_tensors(checkpoint.config, in_memory(tensors, shard, dtype))
        with atomic_file(directory / file) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        places |= dict.fromkeys(state, file)
        size += sum(tensor.nbytes for tensor in state.values())
        kinds |= {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    if len(shards) > 1:
        _write_json(directory / INDEX, dict(metadata=dict(total_size=size), weight_map=places))
    _remove_others(directory, {*places.values()})
    copy_tokenizer(directory, tokenizer)
    generation = _generation_config(Path(tokenizer), stop_ids)
    _write_json(directory / GENERATION, generation)
    values["torch_dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    # null where there is none: else transformers takes the family's own number, which for GLM is 151,329
    values |= {name: generation.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "config.json", values)  # last: with it the directory is a model
    return directory


def _remove_others(directory: Path, written: set[str]) -> None:
    """Weights of an earlier export: transformers would read one file rather than new shards, we an old index rather
    than one new file. When this is called the new ones are complete, so a crash leaves a whole model, old or new."""
    if SINGLE in written:
        (directory / INDEX).unlink(missing_ok=True)  # before the shards that it names
    for path in list(directory.iterdir()):
        if OURS.fullmatch(path.name) and path.name not in written:
            path.unlink()


def _shards(tensors: StoredTensors, dtype: torch.dtype | None, limit: int) -> list[list[str]]:
    """Names, in files of at most `limit` bytes. A layer that is larger has a file of its own: what transformers fuses
    (GLM's gate_up_proj) must not be apart."""
    shards, size = [[]], 0
    layer = {name: int(found[1]) if (found := LAYER.match(name)) else -1 for name in tensors}
    for _, group in groupby(sorted(tensors, key=layer.__getitem__), key=layer.__getitem__):
        names = list(group)
        places = [tensors.places[name] for name in names]
        bytes = sum(torch.Size(place.shape).numel() * (dtype or place.dtype).itemsize for place in places)
        if shards[-1] and size + bytes > limit:
            shards.append([])
            size = 0
        shards[-1] += names
        size += bytes
    return shards


def _generation_config(tokenizer: Path, stop_ids: set[int] | frozenset[int]) -> dict[str, Any]:
    """What `generate` of transformers goes by: what the tokenizer's own directory says, and where an answer ends."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    values = {}
    if (folder / GENERATION).is_file():
        values = read_json(folder / GENERATION)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        known = Tokenizer.load(folder)
        for role in ("bos", "pad"):
            if (number := known.control.get(known.special(f"{role}_token"))) is not None:
                values.setdefault(f"{role}_token_id", number)
    return values | dict(eos_token_id=sorted(stop_ids))


def copy_tokenizer(directory: Path, tokenizer: Path | str) -> None:
    """Its files, so that transformers reads them without code of others: SentencePiece's model is written as a
    tokenizer.json, and a chat template that only we know as a file."""
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    for name in TOKENIZER:
        if (folder / name).is_file():
            with atomic_file(directory / name) as temporary:
                shutil.copyfile(folder / name, temporary)
    has_json = (folder / "tokenizer.json").is_file()
    if not has_json and not (folder / "tokenizer.model").is_file():
        return
    spec, template, config, _ = read_files(folder)
    is_chatml = any(token["content"] == IM_START for token in spec["added_tokens"])
    if not has_json:
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        spec["added_tokens"] = [flags | token for token in spec["added_tokens"]]
        spec = dict(version="1.0", truncation=None, padding=None, post_processor=None) | spec
        _write_json(directory / "tokenizer.json", spec)
        kept = {name: value for name, value in config.items() if name.endswith("_token")}
        _write_json(directory / "tokenizer_config.json", kept | dict(tokenizer_class="PreTrainedTokenizerFast"))
    if template is None and is_chatml:
        template = TEMPLATE
    if template is not None and "chat_template" not in config:
        with atomic_file(directory / CHAT_TEMPLATE) as temporary:
            temporary.write_text(template, encoding="utf-8", newline="\n")


def _write_json(path: Path, values: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")


# ---- one file


def save_pth(path: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Our own format (model/checkpoint.py)."""
    state = _all(checkpoint, dtype)
    write_plain(path, dict(format=FORMAT, **_described(checkpoint)), model=state)


def save_safetensors(path: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Our names, with what a .pth says of itself as JSON in the file's header (read by model/interop/single.py)."""
    state = _all(checkpoint, dtype)
    with atomic_file(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "sparrow": json.dumps(_described(checkpoint))})


def _all(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = stored_once(checkpoint.config, checkpoint.state)
    return in_memory(tensors, tensors, dtype)


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(config=checkpoint.config.to_dict(), tokenizer=checkpoint.tokenizer, lineage=checkpoint.lineage)


def save_minimind(path: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """The bare tensors that MiniMind's code loads, and beside them `<name>.json`, the attributes of its config."""
    values = config_to_minimind(checkpoint.config)
    state = _all(checkpoint, dtype)
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # theirs hold both names, of one memory
    _write_json(path.with_suffix(".json"), values)
    with atomic_file(path) as temporary:
        torch_save(state, temporary)


def save_gguf(path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: str) -> list[str]:
    """For llama.cpp, and beside it `<name>.Modelfile` for ollama -> lines to print. dtype: of model/interop/gguf.py"""
    state = stored_once(checkpoint.config, checkpoint.state)
    notes = write_gguf(path, checkpoint.config, state, tokenizer, dtype=dtype)
    with atomic_file(path.with_suffix(".Modelfile")) as temporary:
        temporary.write_text(modelfile(path.name, tokenizer), encoding="utf-8", newline="\n")
    return notes


# ---- adapters


def write_peft(folder: Path, adapter: AdapterFile, tokenizer: Path | str | None) -> Path:
    """An adapter file -> a directory that peft loads. tokenizer: its directory, to be copied; None: none is known.

    Where transformers has no family for the base, that is said: MiniMind's own code may build it under these names.
    """
    if adapter.config:
        try:
            config_to_hf(adapter.config)
        except UserError as error:
            note(f"for peft: {error}; so it needs other code that builds the base, or merge the adapter into it")
    numbers = [int(part) for name in adapter.state for part in name.split(".") if part.isdigit()]
    layers = adapter.config.num_hidden_layers if adapter.config else max(numbers) + 1
    state = hf_adapter(adapter.config, adapter.state) if adapter.config else adapter.state
    save_peft(folder, adapter.settings.to_dict(), state, adapter.base, layers)
    if tokenizer is not None:
        copy_tokenizer(folder, tokenizer)
    return folder


def save_adapter_pth(path: Path, adapter: AdapterFile, base: Checkpoint) -> None:
    """Our own format (model/adapter.py)."""
    values = dict(
        settings=adapter.settings.to_dict(),
        base=adapter.base | dict(path=str(Path(base.path).resolve()), hash=base.hash),
        config=base.config.to_dict(),
        tokenizer=adapter.tokenizer or base.tokenizer,
        lineage=adapter.lineage or base.lineage,
    )
    write_plain(path, dict(format=ADAPTER_FORMAT, **values), lora=adapter.state)


def save_adapter_minimind(path: Path, adapter: AdapterFile) -> None:
    """MiniMind's: matrices alone, the scale inside B."""
    state = lora_to_minimind(adapter.state, adapter.settings.scale)
    with atomic_file(path) as temporary:
        torch_save(state, temporary)


def merged(checkpoint: Checkpoint, adapter: AdapterFile, as_stored: bool) -> Checkpoint:
    """The weights with an adapter in them, as `merge_into` gives them. as_stored: rounded to the dtype they had."""
    state = stored_once(checkpoint.config, adapter.merge_into(checkpoint).state_dict())
    if as_stored and not adapter.bits:
        stored = stored_once(checkpoint.config, checkpoint.state).places
        state = {name: tensor.to(stored[name].dtype) for name, tensor in state.items()}
    return replace(checkpoint, state=state, lineage=adapter.lineage or checkpoint.lineage)
