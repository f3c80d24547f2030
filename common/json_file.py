"""JSON files of others: whatever is wrong with one, a single line says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.console import UserError


def read_json(path: Path) -> Any:
    """UserError if it is not JSON. A file that is not there is an OSError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # no text, a number of thousands of digits, as many brackets
        raise UserError(f"{path}: not JSON ({error})") from None
