"""A user's mistake, and the checks that find one in a setting."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable
from typing import Any
from unicodedata import category

MAX_SEED = 2**63 - 1
"""The largest whole number that torch takes."""
NEAR = 0.75
"""Of the letters of two names so many are alike, in their order, where one is the other mistyped."""
LARGEST = 1_000_000
"""No number of a setting is larger where nothing else is said: what is, is a slip of the hand."""
LONGEST_MESSAGE = 600
"""In characters; what is longer (it names something of thousands of letters) loses its middle."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""In bytes, on Linux; others take no more."""


class UserError(ValueError):
    """A mistake of the user's, in one line: what is wrong and what would be right. The command line exits with 2."""

    told: bool | None = None
    """Whether another process of the same run tells of it; None where nobody has asked."""

    def __str__(self) -> str:
        """What would end the line or do something to a terminal is written as Python writes it."""
        text = "".join(c if c.isprintable() or category(c) == "Zs" else repr(c)[1:-1] for c in super().__str__())
        if len(text) <= LONGEST_MESSAGE:
            return text
        return f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"


def expanded(path: str) -> str:
    """A path with `~` as the user's home. Raises `UserError` where there is none, or where no file can be called so."""
    found = os.path.expanduser(path)
    if found.split("/")[0] == "~":
        raise UserError(f"{path} begins with ~, and this user has no home: it must be named whole")
    try:
        encoded = os.fsencode(found)
    except UnicodeEncodeError as error:
        raise UserError(f"{path} is no path: it has half of a character ({error.object[error.start]!r})") from error
    if b"\0" in encoded:
        raise UserError(f"{path} is no path: it has a NUL character")
    for part, longest in ((encoded, LONGEST_PATH), *((name, LONGEST_NAME) for name in encoded.split(b"/"))):
        if len(part) > longest:
            raise UserError(f"{path} is no path: {len(part):,} bytes are too long, it must be {longest:,} at most")
    return found


def expand(config: Any, *names: str) -> None:
    """`expanded`, of those fields of a frozen config that hold a path."""
    for name in names:
        if (path := getattr(config, name)) is not None:
            check(path != "", name, path, "a name or a path")
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


def check_limits(config: Any, **limits: float) -> None:
    """No number of a config is over its limit: that in `limits`, or `LARGEST`."""
    for name in (field.name for field in dataclasses.fields(config)):
        value, limit = getattr(config, name), limits.get(name, LARGEST)
        if isinstance(value, int | float):
            check(not value > limit, name, value, f"at most {limit:,}")


def check_fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(0 <= value < 1, name, value, "from 0 up to, but not including, 1")
