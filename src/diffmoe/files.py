"""Files that appear whole or not at all, and where none may go."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from diffmoe.config import EMBEDDED_DATASETS, DataConfig, UserError, dataset_name


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


def as_json(value: object, indent: int) -> str:
    """As JSON, every character as it is; what is no UTF-8, of a name, becomes an escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def check_writable(folder: Path) -> None:
    """Raises `UserError` where files cannot be made in `folder`, which need not exist yet; leaves nothing behind.

    By making one: permissions alone do not tell.
    """
    place = folder.absolute()
    missing = [part for part in (place, *place.parents) if not os.path.exists(part)]
    standing = missing[-1].parent if missing else place
    if not standing.is_dir():
        raise UserError(f"{folder} cannot be written: {standing} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        for part in missing:
            with suppress(OSError):  # not made, or another's by now
                part.rmdir()


def check_outside_data(folder: Path, data: DataConfig, flag: str, default: str) -> None:
    """Raises `UserError` where `folder` is that of the data or lies in it: what is written there would be read as data.

    Links are followed. `flag` is the one that leads there, and `default` a name for what would be right.
    """
    for place in map(_data_folder, data.sets):
        if place is not None and folder.resolve().is_relative_to(place.resolve()):
            raise UserError(
                f"{flag} leads to {folder}, in {place}, the folder of the data: what is written there would be read as "
                f"data; give another, such as --{flag} {place.resolve()}_{default}"
            )


def _data_folder(data: DataConfig) -> Path | None:
    """The folder that is looked through for the set; None where it is made here, or its table is named."""
    if data.dataset in EMBEDDED_DATASETS:
        return None
    if data.data_dir is None:
        named = Path(data.dataset)
        return None if named.is_file() else named
    root = Path(data.data_dir)
    return named if (named := root / dataset_name(data.dataset)).is_dir() else root
