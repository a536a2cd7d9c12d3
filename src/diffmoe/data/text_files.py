"""Text files as lines and rows: UTF-8 with or without a byte-order mark, any line ends, the last one there or not.

What cannot be read without losing or changing something is one line that names the file and the line in it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffmoe.config import UserError
from diffmoe.data.pictures import PICTURE_SUFFIXES

_LINE_END = re.compile(r"\r\n?|\n")
_CELL = r'(?:"(?:[^"]|"")*+"|(?!")[^{0}\r\n]*+)(?:{0}|\r\n?|\n|\Z)'
"""A whole cell of a CSV file and what ends it: where the next one does not match, a quote is astray."""
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_QUOTES = 'end the cell with a quote, and double those inside ("a ""so called"" dog")'


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, without their ends, and the number of each, from 1. Raises `UserError`."""
    for number, line in enumerate(_LINE_END.split(_read(path)), 1):
        if line.strip():
            yield number, line


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a JSON Lines file, and the line of each. Raises `UserError`."""
    for number, line in read_lines(path):
        try:
            row = json.loads(line, object_pairs_hook=_unrepeated)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} must be an object such as {{'image': 'a.jpg', 'caption': '...'}}")
        yield number, row


def read_csv(path: Path, picture_column: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV table under their names in its head, and the line that each begins in; a short row has fewer.

    Cells are separated by commas, semicolons or tabs, whichever the head has most of.
    A line break in a quoted cell counts as white space between words. Raises `UserError` where a quote is astray, a
    row is longer than the head, or a name comes twice in it. A stray quote that a later one happens to close makes
    one cell of the rows between: a row is taken for several where more than one of its lines, read alone, has a
    picture file in `picture_column`.
    """
    text = _read(path)
    first_line = text.lstrip().partition("\n")[0].partition("\r")[0]
    separator = max(_SEPARATORS, key=first_line.count)
    rows = _csv_rows(path, text, separator)
    number, names, lines = next(rows, (1, [], ()))
    head = [name.strip() for name in names]
    for name in filter(None, head):
        if head.count(name) > 1:
            raise UserError(f"{path} line {number} has the column {name} more than once: each must have its own name")
    column = head.index(picture_column) if picture_column in head else len(head)
    _check_one_row(path, number, lines, separator, column, pictures=0)
    for number, cells, lines in rows:
        _check_one_row(path, number, lines, separator, column, pictures=1)
        if len(cells) > len(head):
            raise UserError(
                f"{path} line {number} has more cells than the head: quote captions with {_SEPARATORS[separator]}"
            )
        yield number, dict(zip(head, map(_join_lines, cells), strict=False))


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = _line_at(error.object[: error.start].decode(), error.start)
        raise UserError(f"{path} line {line} is not UTF-8: save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if "\0" in text:
        raise UserError(f"{path} line {_line_at(text, text.index(chr(0)))} has a NUL byte: save the file as UTF-8")
    return text


def _line_at(text: str, position: int) -> int:
    return len(_LINE_END.findall(text[:position])) + 1


def _unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} more than once")
    return row


def _csv_rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str], Sequence[str]]]:
    """Of each row that is not blank: its first line's number, its cells, its lines."""
    lines = io.StringIO(text, newline="").readlines()  # ends kept: csv tells a row's from those in a quoted cell
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        start = reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _csv_mistake(path, text, separator, start + 1, error) from error
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield start + 1, cells, lines[start : reader.line_num]


def _csv_mistake(path: Path, text: str, separator: str, row_line: int, error: csv.Error) -> UserError:
    position, whole_cell = 0, re.compile(_CELL.format(separator))
    while position < len(text) and (cell := whole_cell.match(text, position)):
        position = cell.end()
    if position == len(text):
        return UserError(f"{path} line {row_line} cannot be read ({error}): shorten the cell")
    where = f"{path} line {_line_at(text, position)}"
    return UserError(f"{where} has a cell that opens with a quote but does not end with one: {_QUOTES}")


def _check_one_row(path: Path, number: int, lines: Sequence[str], separator: str, column: int, pictures: int) -> None:
    """Raises `UserError` where more than so many of a row's lines, read alone, have a picture file in `column`."""
    found = []
    for later, line in enumerate(lines, number) if len(lines) > 1 else ():
        cells = line.replace('"', "").split(separator)
        name = cells[column].strip() if column < len(cells) else ""
        if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES or (name and os.path.isfile(path.parent / name)):
            found.append(later)
    if len(found) > pictures:
        raise UserError(
            f"{path} line {number} opens a quote that takes in the row of line {found[pictures]}: {_QUOTES}"
        )


def _join_lines(cell: str) -> str:
    """A cell's lines as one, with single spaces where they broke; a cell of one line as it is."""
    lines = _LINE_END.split(cell)
    return cell if len(lines) == 1 else " ".join(filter(None, map(str.strip, lines)))
