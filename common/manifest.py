"""The saved states of a run, step_00000500 and the like, and the manifest of each: size and SHA-256 of its files, so
that damage is noticed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common.files import hash_file

MANIFEST = "manifest.json"


def number_of(state: Path) -> tuple[int, int] | None:
    """step_00000500.1 -> (500, 1): saved after step 500, for the second time. None: not the name of a state."""
    match = re.fullmatch(r"step_(\d+)(?:\.(\d+))?", state.name)
    return match and (int(match[1]), int(match[2] or 0))


def states_in(run: Path) -> list[Path]:
    """The states in a run's folder, whole or damaged, the oldest first."""
    found = [(number, path) for path in run.glob("step_*") if (number := number_of(path)) and path.is_dir()]
    return [path for _, path in sorted(found)]


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
