"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from diffmoe.config import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Make the folder, call `write` with a temporary path beside `path`, and move the result into place.

    Raises `UserError` where the file cannot be written; `path` is then as it was.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Raises `UserError` where files cannot be made in `folder`, which need not exist yet; makes nothing."""
    standing = folder.absolute()
    while not standing.exists():
        standing = standing.parent
    if not standing.is_dir():
        raise UserError(f"{folder} cannot be written: {standing} is a file")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: no permission for {standing}")
