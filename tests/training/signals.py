"""Signals and crashes at a moment of one's choice."""

from __future__ import annotations

import os
from typing import Any

import pytest


def send_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: list[int], *signals: int) -> None:
    """Send this process the signals while `owner.name` is called for the `calls`-th time, counted from 1."""
    original, count = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        for number in signals if count in calls else ():
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


class Crash(Exception):  # noqa: N818 - the power fails
    """Nobody catches it: what is on disk is all that is left."""


def crash_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Die as `owner.name` is called for the `call`-th time."""
    original, count = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
