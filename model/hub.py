"""Models of a hub: which of a repository's files are fetched, and where they are on this disk.

find_model("Qwen/Qwen2-0.5B")     # models/Qwen2-0.5B, or the copy in Hugging Face's cache, or fetched now
find_path("out/lora_model")       # a path stays itself; of a name on a hub as above
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from common.console import UserError
from common.fetch import announce, download, unfinished
from common.files import ROOT, put_in_place
from common.hubs import RemoteFile, Repository, check_id, default_source, is_id, list_files, listed, pick, typed_name
from common.json_file import read_json
from tokenizer.text import Tokenizer

MODELS = ROOT / "models"
ABOUT = ".fetched.json"  # in a fetched folder: what it is a copy of

# Weights of other kinds are pickles, which are read without running code, but only where nothing better is there. Code
# (*.py) is never fetched: the families are built in.
TEXTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*")
PICKLES = ("pytorch_model*.bin", "*.pth")
CONFIGS = ("config.json", "adapter_config.json")  # of a model, and of an adapter


class Part(NamedTuple):
    """Files of one repository."""

    ids: dict[str, str]  # source -> the repository's id there
    patterns: tuple[str, ...] = ()  # of names; (): all that belongs to a model


KNOWN = {  # short names, each a folder in models/
    "MiniMind2-PyTorch": (
        Part(
            {"huggingface": "jingyaogong/MiniMind2-Pytorch", "modelscope": "gongjy/MiniMind2-PyTorch"}, ("*_512.pth",)
        ),
        Part(  # the tokenizer, which MiniMind keeps with its code, and with its models for transformers
            {"huggingface": "jingyaogong/MiniMind2-Small", "modelscope": "gongjy/MiniMind2-Small"}, ("tokenizer*.json",)
        ),
    )
}


def find_path(path: Path | str) -> Path:
    """A path as it is. Where OWNER/NAME was typed and there is no such path, the folder of that model on a hub."""
    name = typed_name(path)
    return find_model(name) if is_id(name) and not Path(path).exists() else Path(path)


def load_tokenizer(path: Path | str | None) -> Tokenizer:
    """--tokenizer_path: a path, or a model on a hub; None: the tokenizer of this repository."""
    return Tokenizer.load(None if path is None else find_path(path))


def find_model(id: str) -> Path:
    """The folder of a hub's model: models/NAME, a snapshot in Hugging Face's cache, else fetched now."""
    folder = MODELS / id.partition("/")[2]
    if _about(folder).get("name") == id:
        return folder
    for place in (folder, *_snapshots(id)):
        if not _about(place) and _is_whole(place):
            return place
    try:
        return fetch_model(id)
    except UserError as error:
        reason = str(error).removeprefix(f"{id}: ")
        raise UserError(f"{id}: no such file or directory; as a model on a hub: {reason}") from None


def fetch_model(
    name: str,
    *,
    source: str | None = None,
    revision: str | None = None,
    to: Path | None = None,
    patterns: Sequence[str] = (),
) -> Path:
    """Fetches a model, a key of KNOWN or an id -> its folder in `to` (default: models/). It has its name only once all
    of it is there. A folder that is there already is left as it is.

    patterns  of the names of files, in place of all that belongs to a model
    """
    source, to = source or default_source(), to or MODELS
    if name not in KNOWN:
        check_id(name)
    target = to / name.rpartition("/")[2]
    about = dict(name=name, revision=revision, patterns=list(patterns))
    if target.exists():
        _check_copy(target, about)
        return target
    repositories, chosen = [], []
    for part in KNOWN.get(name) or (Part({source: name}, tuple(patterns)),):
        repositories.append(list_files(part.ids[source], "model", source=source, revision=revision))
        found = repositories[-1]
        chosen.append(pick(found, part.patterns) if part.patterns else files_of_a_model(found))
    with unfinished(to, target.name) as partial:
        if target.exists():  # now, made by the process that this one has waited for
            return target
        for repository, files in zip(repositories, chosen):
            announce(repository, files, target)
            download(repository, files, partial)
        wanted = {file.name for files in chosen for file in files}
        for path in partial.rglob("*"):  # left by a download of another revision, say
            if path.is_file() and path.relative_to(partial).as_posix() not in wanted:
                path.unlink()
        sources = [dict(id=one.id, source=one.source, commit=one.revision) for one in repositories]
        (partial / ABOUT).write_text(json.dumps(about | dict(sources=sources)), encoding="utf-8")
        put_in_place(partial, target)
    return target


def _check_copy(folder: Path, wanted: dict[str, Any]) -> None:
    """UserError if a folder that is there was fetched as something else. One that was made by hand may be anything."""
    about = _about(folder) or wanted | dict(revision=None, patterns=[])
    different = wanted["name"] != about.get("name")
    different |= wanted["revision"] not in (None, about.get("revision"))
    different |= bool(wanted["patterns"]) and wanted["patterns"] != about.get("patterns")
    if different:
        at = f", revision {about['revision']}" if about.get("revision") else ""
        at += f", only {' '.join(about['patterns'])}" if about.get("patterns") else ""
        raise UserError(
            f"{wanted['name']}: {folder} is there already, a copy of {about.get('name')}{at}; remove it, or choose "
            "another folder with --to"
        )


def files_of_a_model(repository: Repository) -> list[RemoteFile]:
    """Weights, settings and tokenizer; nothing from below the top folder, where other programs' copies are."""

    def matching(*patterns: str) -> list[RemoteFile]:
        names = [file for file in repository.files if "/" not in file.name]
        return [file for file in names if any(fnmatchcase(file.name, pattern) for pattern in patterns)]

    texts, weights = matching(*TEXTS), matching("*.safetensors")
    # Mistral's directories hold the same weights twice, for another program under this name
    weights = [file for file in weights if not file.name.startswith("consolidated")] or weights
    if weights:
        texts = [file for file in texts if not file.name.endswith(".bin.index.json")]
    elif not (weights := matching(*PICKLES)):
        readable = "*.safetensors, *.bin, *.pth"
        raise UserError(f"{repository.id}: has no weights that can be read ({readable}), only {listed(repository)}")
    return texts + weights


def _about(folder: Path) -> dict[str, Any]:
    """What a folder that was fetched is a copy of; {}: it was not fetched, or is not there."""
    try:
        about = read_json(folder / ABOUT)
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _is_whole(folder: Path) -> bool:
    """Whether a copy that somebody else made has its settings, and all the weights that its index names."""
    if not any((folder / name).is_file() for name in CONFIGS):
        return False
    for index in folder.glob("*.index.json"):
        try:
            names = set(read_json(index)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        if not all((folder / name).is_file() for name in names):
            return False
    return any(path for pattern in ("*.safetensors", *PICKLES) for path in folder.glob(pattern))


def _snapshots(id: str) -> list[Path]:
    """The copies in Hugging Face's cache, that of the main branch first: huggingface.co/docs/hub/local-cache."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser() / f"models--{id.replace('/', '--')}"
    try:
        main = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    return sorted((cache / "snapshots").glob("*"), key=lambda path: path.name != main)
