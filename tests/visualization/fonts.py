"""A machine without Chinese fonts, for the tests of whatever draws."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffmoe.visualization import style


@pytest.fixture
def only_base_font(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with no Chinese font, and with nothing said yet."""
    monkeypatch.setattr(style, "font_families", lambda: [style.BASE_FONT])
    for cached in (style._drawable, style._warn_of_missing_font):
        cached.cache_clear()
    yield
    for cached in (style._drawable, style._warn_of_missing_font):
        cached.cache_clear()
