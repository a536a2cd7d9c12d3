"""A real browser, for the tests of what is looked at in one; a fixture of all tests, as two could not run at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Callable[..., Any]]:
    """A function that opens a window of a size in the system's Chromium, headless; none knows of another.

    It returns playwright's `BrowserContext`. The profile is new and empty, and removed at the end.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not there: pip install playwright")
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no {CHROMIUM}: apt install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))

        def start(width: int, height: int, **options: Any) -> Any:
            return chromium.new_context(viewport={"width": width, "height": height}, **options)

        yield start
        chromium.close()
