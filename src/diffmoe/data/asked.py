"""What a user asks about by words becomes picture files: files, folders, patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffmoe.config import UserError, expanded
from diffmoe.data.folders import is_picture, picture_files


class Asked(NamedTuple):
    """A picture that is asked about."""

    path: str
    by_name: bool
    """Named itself, not found in a folder or by a pattern."""


def asked_pictures(words: Sequence[str]) -> list[Asked]:
    """The picture files that words lead to, in their order; what is found again after it was had is left out.

    A word is a file; a folder, of which all pictures are meant, those in its folders too; or, where nothing is so
    called, a pattern with `*`, `?`, `[...]`, or `**` for any folders, for shells that do not expand it themselves.

    Raises `UserError` naming a folder or a pattern without pictures, or a folder that cannot be looked into.
    """
    asked: list[Asked] = []
    had: set[str] = set()
    for word in words:
        for picture in _of_word(word):
            if picture.by_name or picture.path not in had:
                asked.append(picture)
                had.add(picture.path)
    return asked


def _of_word(word: str) -> Iterator[Asked]:
    path = expanded(word)
    if os.path.isdir(path):
        found = [str(Path(path, name)) for name in picture_files(Path(path))]
        if not found:
            raise UserError(f"{word} is a folder without pictures")
    elif not os.path.exists(path) and glob.has_magic(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if is_picture(name) and os.path.isfile(name))
        if not found:
            raise UserError(f"{word} fits no picture")
    else:
        yield Asked(word, True)
        return
    yield from (Asked(name, False) for name in found)
