"""A directory in Hugging Face's layout, which transformers, vLLM and llama.cpp read: `config.json`, `model.safetensors`
and the tokenizer's files.

    save_hf("out/final_model", load_weights("out/full_sft_512.pth"), "tokenizer", stop_ids={2})
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from common.console import UserError
from common.files import atomic_file
from model.adapter import AdapterFile
from model.checkpoint import Checkpoint
from model.interop.hf import config_to_hf, hf_tensors
from model.interop.hf_files import INDEX, SINGLE
from model.interop.peft import save_peft
from tokenizer.text import FILES

TOKENIZER = (*FILES, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def save_hf(directory: Path | str, checkpoint: Checkpoint, tokenizer: Path | str, stop_ids: set[int]) -> Path:
    """tokenizer: its directory. stop_ids: what ends an answer."""
    directory = Path(directory)
    try:
        values = config_to_hf(checkpoint.config)
    except ValueError as error:
        raise UserError(f"{directory}: cannot be written in Hugging Face's layout: {error}") from None
    state = hf_tensors(checkpoint.config, checkpoint.state)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    if checkpoint.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # stored once
    with atomic_file(directory / SINGLE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    (directory / INDEX).unlink(missing_ok=True)  # of an earlier export in several files, which readers would prefer
    copy_tokenizer(directory, tokenizer)
    with atomic_file(directory / "config.json") as temporary:  # last: with it the directory is a model
        values |= dict(eos_token_id=sorted(stop_ids))
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return directory


def write_peft(folder: Path, adapter: AdapterFile, tokenizer: Path | str) -> Path:
    """An adapter file of ours -> a directory that peft loads. tokenizer: its directory, to be copied."""
    assert adapter.config is not None  # our own files have it
    layers = adapter.config.num_hidden_layers
    save_peft(folder, adapter.settings.to_dict(), adapter.state, adapter.base, layers)
    copy_tokenizer(folder, tokenizer)
    return folder


def copy_tokenizer(directory: Path, tokenizer: Path | str) -> None:
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    for name in TOKENIZER:
        if (folder / name).is_file():
            with atomic_file(directory / name) as temporary:
                shutil.copyfile(folder / name, temporary)
