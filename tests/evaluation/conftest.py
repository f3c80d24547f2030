"""The browser that the tests of pages share: it takes a second to start."""

import pytest

from tests.helpers.browser import CHROMIUM, Browser


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with Browser() as started:
        yield started
