"""Which files of a directory hold a model's weights, in Hugging Face's layout, and what is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.console import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"(?P<stem>.+)-(?P<n>\d+)-of-(?P<all>\d+)\.safetensors")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory, from the files that `_files_of` chooses. UserError names what is missing."""
    from safetensors import SafetensorError, safe_open

    state: dict[str, Tensor] = {}
    for file, wanted in _files_of(directory).items():
        try:
            with safe_open(file, "pt") as content:
                names = content.keys() if wanted is None else wanted
                if twice := [name for name in names if name in state]:
                    raise UserError(
                        f"{directory}: {twice[0]} is in {file.name} and in another *.safetensors; which one is right "
                        f"only {INDEX} can say"
                    )
                if wanted is not None and (missing := sorted(set(wanted) - set(content.keys()))):
                    raise UserError(f"{file}: has no {missing[0]}, which {INDEX} says is in it; take another copy")
                state.update((name, content.get_tensor(name)) for name in names)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error})") from None
    return state


def _files_of(directory: Path) -> Mapping[Path, list[str] | None]:
    """The files that hold a directory's weights, and what to read from each; None: everything.

    The index decides, if there is one. Files that it does not name are left over from an earlier export, or are the
    same weights under the names of another program (Mistral's `consolidated.safetensors`).
    """
    if (directory / INDEX).is_file():
        return _read_index(directory)
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    found = sorted(directory.glob("*.safetensors"))
    files = [path for path in found if not path.name.startswith(("consolidated", "adapter_model"))]
    if not files:
        only = f", only {found[0].name}, which holds something else or uses other names" if found else ""
        raise UserError(f"{directory}: no *.safetensors beside config.json{only}")
    numbered = {path.name: match for path in files if (match := SHARD.fullmatch(path.name))}
    for match in numbered.values():  # without an index, their names tell at least how many there are
        for n in range(1, int(match["all"]) + 1):
            name = f"{match['stem']}-{n:0{len(match['n'])}}-of-{match['all']}.safetensors"
            if name not in numbered:
                raise UserError(f"{directory}: {name} is missing; copy it too")
    return dict.fromkeys(files)


def _read_index(directory: Path) -> dict[Path, list[str]]:
    index = directory / INDEX
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{index}: not an index of safetensors files, which has a "weight_map"') from None
    files: dict[Path, list[str]] = {}
    for tensor, name in places:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: {tensor}: {name!r} is not the name of a file beside it")
        files.setdefault(directory / name, []).append(tensor)
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"{directory}: {', '.join(missing[:3])}: missing, though {INDEX} names it; copy it too")
    return files
