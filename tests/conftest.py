"""Fixtures of all tests: the repository's folder and, where there is one, the optional real data beside it."""

import os
from pathlib import Path

import pytest

from common.files import ROOT
from tests.helpers.browser import CHROMIUM, Browser

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test fetches anything; those of fetching have a hub of their own


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


@pytest.fixture(scope="session")
def browser():
    """The browser that the tests of pages share: it takes a second to start."""
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with Browser() as started:
        yield started
