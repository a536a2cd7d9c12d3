"""Tables of pictures, as Parquet files and the hub have them: which columns are read, and what their rows hold."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.config import UserError
from diffmoe.data.captions import CaptionSplit, captions_in, check_captions
from diffmoe.data.folders import file_status
from diffmoe.data.labels import LABEL_COLUMN
from diffmoe.data.pictures import LazyImages, PictureSpec

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

PICTURE_COLUMNS = ("image", "img")


@dataclass(frozen=True)
class TablePictures:
    """Pictures in a column of a table: bytes, a path from the table's file, or a struct of both, as on the hub."""

    column: Dataset
    """The column alone, in Arrow format."""
    files: tuple[str, ...]
    """The files whose rows follow one another in the table, or the set's name where they are not known."""
    ends: tuple[int, ...]
    """The row after each file's last."""

    def __len__(self) -> int:
        return len(self.column)

    def read(self, rows: Sequence[int]) -> list[bytes | Path]:
        """The encoded pictures at `rows`. Raises `UserError` naming the row where there is none."""
        table: Any = self.column[list(rows)] if rows else None  # a pyarrow table, by the dataset's format
        cells = table.column(0).to_pylist() if rows else []
        return [self._picture(cell, row) for cell, row in zip(cells, rows, strict=True)]

    def _picture(self, cell: Mapping[str, Any] | bytes | str | None, row: int) -> bytes | Path:
        encoded, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
        if isinstance(encoded, str):
            return Path(self.files[self._file(row)]).parent / encoded
        if encoded is not None:
            return encoded
        if path is None:
            raise UserError(f"{self.where(row)} has no picture: it must hold the bytes of one")
        return Path(path)

    def _file(self, row: int) -> int:
        return bisect.bisect_right(self.ends, row)

    def where(self, row: int) -> str:
        """The file and the row in it, counted from 0."""
        file = self._file(row)
        return f"{self.files[file]} row {row - (self.ends[file - 1] if file else 0)}"


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read."""

    picture: str
    captions: tuple[str, ...]
    """Empty where the table has labels."""

    @classmethod
    def of(cls, names: Sequence[str], where: str) -> Columns:
        """Those of a table with these. Raises `UserError` where it has no picture, or neither labels nor captions."""
        captions = () if LABEL_COLUMN in names else tuple(caption_columns(names))
        pictures = [name for name in PICTURE_COLUMNS if name in names]
        if not pictures or not (captions or LABEL_COLUMN in names):
            raise UserError(
                f"{where} has the columns {', '.join(names)}: "
                f"it must have {' or '.join(PICTURE_COLUMNS)}, and {LABEL_COLUMN} or caption, caption_0, ..."
            )
        return cls(pictures[0], captions)

    def __str__(self) -> str:
        return ", ".join((self.picture, *(self.captions or [LABEL_COLUMN])))


def caption_columns(names: Iterable[str]) -> list[str]:
    """The columns that hold captions: caption, captions, caption_0, caption_1, ..."""
    return [name for name in names if re.fullmatch(r"captions?|caption_.*", name)]


def check_task(columns: dict[str, Columns], where: dict[str, str]) -> None:
    """Raises `UserError` naming a split that has labels where train has captions, or the other way round."""
    train = columns["train"]
    for split, found in columns.items():
        if bool(found.captions) != bool(train.captions):
            raise UserError(f"{where[split]} has {found}, but {where['train']} has {train}: both must be of one kind")


def content_fingerprint(files: dict[str, list[Path]], pictures: Iterable[Path] = ()) -> str:
    """Changes with the content of each split's files, and with the size or time of `pictures`."""
    digest = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            with path.open("rb") as file:
                digest.update(split.encode() + hashlib.file_digest(file, "sha256").digest())
    for path in pictures:
        status = file_status(path)
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def with_captions(pictures: TablePictures, picture: PictureSpec, tables: Iterable[pa.Table]) -> CaptionSplit:
    """Pictures with the captions in the rows of tables that follow one another. Raises `UserError` naming a bad row."""
    rows = itertools.chain.from_iterable(zip(*(c.to_pylist() for c in table.columns), strict=True) for table in tables)
    captions = tuple(tuple(captions_in(cells)) for cells in rows)
    check_captions(captions, pictures.where)
    return CaptionSplit(LazyImages.of(pictures, picture), captions)
