"""A user's mistake, and the checks that find one in a setting."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any
from unicodedata import category

MAX_SEED = 2**63 - 1
"""The largest whole number that torch takes."""
NEAR = 0.75
"""Of the letters of two names so many are alike, in their order, where one is the other mistyped."""


class UserError(ValueError):
    """A mistake of the user's, in one line: what is wrong and what would be right. The command line exits with 2."""

    def __str__(self) -> str:
        """What would end the line or do something to a terminal is written as Python writes it."""
        return "".join(c if c.isprintable() or category(c) == "Zs" else repr(c)[1:-1] for c in super().__str__())


def expanded(path: str) -> str:
    """A path with `~` as the user's home. Raises `UserError` where there is none."""
    found = os.path.expanduser(path)
    if found.split("/")[0] == "~":
        raise UserError(f"{path} begins with ~, and this user has no home: it must be named whole")
    return found


def expand(config: Any, *names: str) -> None:
    """`expanded`, of those fields of a frozen config that hold a path."""
    for name in names:
        if (path := getattr(config, name)) is not None:
            object.__setattr__(config, name, expanded(path))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped or shortened name: ` (did you mean 'top_k'?)`, or an empty string.

    Where none is really near, a guess would send the user to a setting that has nothing to do with what was wanted.
    """
    names = list(known)
    begun = [each for each in names if each.startswith(name)]
    match = (
        difflib.get_close_matches(name, names, n=1, cutoff=NEAR)
        or [each for each in names if sorted(each) == sorted(name)]  # letters swapped, in a short name
        or (begun if len(begun) == 1 else [])
    )
    return f" (did you mean '{match[0]}'?)" if match else ""


def check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}: it must be {expected}")


def check_at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(value >= minimum, name, value, f"at least {minimum}")


def check_at_most(config: Any, maximum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(value <= maximum, name, value, f"at most {maximum}")


def check_fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(0 <= value < 1, name, value, "from 0 up to, but not including, 1")
