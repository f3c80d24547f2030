"""One .safetensors file with our names, and what a .pth says of itself as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from common.console import UserError


def read_single(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """({"config", "tokenizer", "lineage"}, tensors). UserError: the file is damaged, or does not describe itself."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {}).get("sparrow", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if not isinstance(values, dict) or not values.keys() >= {"config", "tokenizer", "lineage"}:
        raise UserError(f"{path}: says nothing of its architecture; give the directory that has its config.json")
    return values, state
