"""The language of figures and reports: English texts stand in the code, their Chinese in `chinese/*.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Language = Literal["en", "zh"]
LANGUAGES: tuple[str, ...] = get_args(Language)
_current: ContextVar[Language] = ContextVar("language", default="en")


@contextmanager
def speaking(language: Language) -> Iterator[None]:
    """Within it, `say` speaks `language`."""
    token = _current.set(language)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Language:
    """The language that `say` speaks now."""
    return _current.get()


def say(text: str, **values: Any) -> str:
    """An English `text` in the current language, its {fields} filled in as `str.format` does.

    A text that no table has stays English: `tests/visualization/test_language.py` finds it.
    """
    spoken = chinese().get(text, text) if current() == "zh" else text
    return spoken.format(**values) if values else spoken


@cache
def chinese() -> dict[str, str]:
    """All tables, as one: English text -> Chinese text."""
    table: dict[str, str] = {}
    for path in sorted((Path(__file__).parent / "chinese").glob("*.yaml")):
        table |= yaml.safe_load(path.read_text(encoding="utf-8"))
    return table
