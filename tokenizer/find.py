"""Finds the tokenizer that weights were trained with. With another one, every answer would be noise; its hash tells."""

from __future__ import annotations

from pathlib import Path

from common.console import UserError
from tokenizer.text import FILES, SHIPPED, Tokenizer

PLACES = ("", "tokenizer", "final_model", "lora_model")  # where it may lie below the folder that holds the weights


def backup_path(directory: Path, hash: str) -> Path:
    """Where a tokenizer is kept when another one replaces it in `directory`: weights may still need it."""
    directory = directory.absolute()
    return directory.parent / f"{directory.name}-{hash[:12]}"


def tokenizer_of(recorded: dict, weights: Path, vocab_size: int, path: str | None = None) -> Tokenizer:
    """The tokenizer that `weights` were trained with.

    recorded    {"path", "hash"} from the weights file; empty for files of other projects
    weights     their file or folder
    vocab_size  number of token embeddings; a tokenizer with more tokens is a UserError
    path        look only here (--tokenizer_path); the hash must still match
    """
    folder = weights if weights.is_dir() else weights.parent
    if path is not None:
        places = [Path(path)]
    else:  # a path inside the repository is recorded relative to it, so that the repository can be moved
        places = [SHIPPED.parent / recorded["path"]] if recorded.get("path") else []
        around = [folder, folder.parent] if folder.name in ("best", "lora") else [folder]
        places += [place / name for place in around for name in PLACES] + ([SHIPPED] if recorded else [])
    if recorded.get("hash"):
        places += [backup_path(place, recorded["hash"]) for place in places if place != SHIPPED]
    found = []
    for place in places:
        if any((place / name).is_file() for name in FILES) or place.suffix == ".json":
            tokenizer = Tokenizer.load(place)
            if recorded.get("hash") in (None, tokenizer.hash):
                if tokenizer.vocab_size > vocab_size:
                    raise UserError(
                        f"{weights}: has {vocab_size:,} token embeddings, but the tokenizer in {place} has "
                        f"{tokenizer.vocab_size:,} tokens; give its own with --tokenizer_path"
                    )
                return tokenizer
            found.append(f"{place} is another one ({tokenizer.hash[:12]})")
    wanted = f"the tokenizer {recorded['hash'][:12]} it was trained with" if recorded.get("hash") else "its tokenizer"
    looked = "; ".join(found) or f"none in {', '.join(str(place) for place in places if place.is_dir())}"
    raise UserError(f"{weights}: cannot find {wanted}: {looked}. Say where it is with --tokenizer_path")
