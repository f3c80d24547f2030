"""One .safetensors file with our names, and what a .pth says of itself as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.console import UserError
from model.tensor_files import StoredTensors, open_safetensors


def read_single(path: Path) -> tuple[dict[str, Any], StoredTensors]:
    """({"config", "tokenizer", "lineage"}, tensors). UserError: the file is damaged, or does not describe itself."""
    from safetensors import safe_open

    tensors = StoredTensors(open_safetensors(path))
    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("sparrow", "null")
    try:
        values = json.loads(about)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not values.keys() >= {"config", "tokenizer", "lineage"}:
        raise UserError(f"{path}: says nothing of its architecture; give the directory that has its config.json")
    return values, tensors
