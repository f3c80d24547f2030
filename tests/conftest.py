"""Puts the repository on the path and finds the optional real data next to it."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Checkpoints and real text beside the repository; what needs them is skipped where they are not."""
    path = Path(os.environ.get("SPARROW_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip("needs ../shared")
    return path
