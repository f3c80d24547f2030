"""The manifest of a saved state: size and SHA-256 of each of its files, so that damage is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.files import hash_file

MANIFEST = "manifest.json"


def write_manifest(folder: Path, names: list[str]) -> None:
    """Of these files of the folder."""
    text = json.dumps({name: _fingerprint(folder / name) for name in names}, indent=1, ensure_ascii=False)
    with open(folder / MANIFEST, "wb") as file:
        file.write(text.encode())


def problem(folder: Path, only: str | None = None) -> str | None:
    """What is wrong with a state on the disk: which file is missing, or is not what was written. None: it is whole.

    only: look at this file alone, since reading all of a large model takes minutes
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if not isinstance(manifest, dict) or "state.json" not in manifest:
        return f"{MANIFEST} is damaged (it does not list state.json)"
    for name, expected in manifest.items():
        if only not in (None, name):
            continue
        try:
            if Path(name).name != name or _fingerprint(folder / name) != expected:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}
