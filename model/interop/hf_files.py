"""Which files of a directory hold a model's weights, in Hugging Face's layout, and what is in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.console import UserError
from common.json_file import read_json
from model.tensor_files import Place, StoredTensors, open_pickled, open_safetensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"  # of older exports
SHARD = re.compile(r"(?P<stem>.+)-(?P<n>\d+)-of-(?P<all>\d+)\.(?P<ending>safetensors|bin)")


def open_tensors(directory: Path) -> StoredTensors:
    """The tensors of a directory, in the files that `_files_of` chooses. UserError names what is missing."""
    found: dict[str, Place | Tensor] = {}
    for file, wanted in _files_of(directory).items():
        content = _open(file)
        names, index = list(content) if wanted is None else wanted, BIN_INDEX if file.suffix == ".bin" else INDEX
        if twice := [name for name in names if name in found]:
            raise UserError(
                f"{directory}: {twice[0]} is in {file.name} and in another *{file.suffix}; which one is right "
                f"only {index} can say"
            )
        if wanted is not None and (missing := sorted(set(wanted) - set(content))):
            raise UserError(f"{file}: has no {missing[0]}, which {index} says is in it; take another copy")
        found.update((name, content[name]) for name in names)
    return StoredTensors(found)


def _open(file: Path) -> Mapping[str, Place | Tensor]:
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    content = open_pickled(file)
    if not isinstance(content, StoredTensors):
        raise UserError(f"{file}: not weights: it holds other things than tensors")
    return content.places


def _files_of(directory: Path) -> Mapping[Path, list[str] | None]:
    """The files that hold a directory's weights, and what to read from each; None: everything.

    The index decides, if there is one. Files that it does not name are left over from an earlier export, or are the
    same weights under the names of another program (Mistral's `consolidated.safetensors`).
    """
    for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if (directory / index).is_file():
            return _read_index(directory / index)
        if (directory / single).is_file():
            return {directory / single: None}
    if not (files := weight_files(directory)):
        found = sorted(directory.glob("*.safetensors"))
        only = f", only {found[0].name}, which holds something else or uses other names" if found else ""
        raise UserError(f"{directory}: no *.safetensors or pytorch_model*.bin beside config.json{only}")
    numbered = {path.name: match for path in files if (match := SHARD.fullmatch(path.name))}
    for match in numbered.values():  # without an index, their names tell at least how many there are
        for n in range(1, int(match["all"]) + 1):
            name = f"{match['stem']}-{n:0{len(match['n'])}}-of-{match['all']}.{match['ending']}"
            if name not in numbered:
                raise UserError(f"{directory}: {name} is missing; copy it too")
    return dict.fromkeys(files)


def weight_files(directory: Path) -> list[Path]:
    """*.safetensors that may be a model's, else the files of older exports, which are pickles."""
    others = ("consolidated", "adapter_model")
    found = [path for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith(others)]
    return found or sorted(directory.glob("pytorch_model*.bin"))


def _read_index(index: Path) -> dict[Path, list[str]]:
    directory = index.parent
    try:
        places = read_json(index)["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{index}: not an index of files of weights, which has a "weight_map"') from None
    files: dict[Path, list[str]] = {}
    for tensor, name in places:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: {tensor}: {name!r} is not the name of a file beside it")
        files.setdefault(directory / name, []).append(tensor)
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"{directory}: {', '.join(missing[:3])}: missing, though {index.name} names it; copy it too")
    return files
