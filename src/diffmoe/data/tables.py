"""Sets that are tables: Parquet files in the column layout of the hub, and sets on the hub itself."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data.captions import check_captions
from diffmoe.data.hub import load_hub
from diffmoe.data.splits import SPLIT_ALIASES, EncodedCaptions, EncodedSplit

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

PICTURE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"


@dataclass(frozen=True)
class TablePictures:
    """Pictures in a column of a table: bytes, or a struct of bytes and path, as the hub stores them."""

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

    def _picture(self, cell: dict[str, Any] | bytes | None, row: int) -> bytes | Path:
        encoded, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if encoded is not None:
            return encoded
        if path is None:
            raise UserError(f"{self.where(row)} has no picture: it must hold the bytes of one")
        return Path(path)

    def where(self, row: int) -> str:
        """The file and the row in it, counted from 0."""
        file = bisect.bisect_right(self.ends, row)
        return f"{self.files[file]} row {row - (self.ends[file - 1] if file else 0)}"


@dataclass(frozen=True)
class ParquetSource:
    """A set in Parquet files, `<split>-*.parquet`."""

    files: dict[str, list[Path]]
    """The files of each split, in order."""

    has_captions: bool
    """Captions instead of labels."""

    @classmethod
    def open(cls, files: dict[str, list[Path]]) -> ParquetSource:
        """Check the files' columns, reading no row. Raises `UserError` naming a file that will not do."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        has_captions = False
        for path in itertools.chain.from_iterable(files.values()):
            try:
                has_captions = _check_columns(pq.read_schema(path).names, str(path))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} must be a Parquet file that can be read ({_one_line(error)})") from error
        return cls(files, has_captions)

    def __len__(self) -> int:
        return sum(ends[-1] for ends in map(self._ends, self.files))

    def _ends(self, split: str) -> tuple[int, ...]:
        import pyarrow.parquet as pq

        return tuple(itertools.accumulate(pq.read_metadata(path).num_rows for path in self.files[split]))

    def fingerprint(self) -> str:
        """Changes with the files' content."""
        return _fingerprint(self.files)

    def read(self, in_memory: bool) -> tuple[tuple[str, ...], dict[str, EncodedSplit]]:
        """Class names, and for each split its pictures and labels, int64 (N,). Raises `UserError` naming a bad row."""
        return _split_tables(*self._tables(in_memory))

    def read_captions(self, in_memory: bool) -> dict[str, EncodedCaptions]:
        """For each split its pictures and their captions. Raises `UserError` naming a bad row."""
        return _caption_tables(*self._tables(in_memory))

    def _tables(self, in_memory: bool) -> tuple[dict[str, Dataset], Origins]:
        tables = {}
        for split, paths in self.files.items():
            try:
                tables[split] = _read_parquet(paths) if in_memory else _map_parquet(paths)
            except Exception as error:  # pyarrow's, or those that `datasets` wraps them in
                raise UserError(f"{paths[0].parent} cannot be read ({_one_line(error)})") from error
        return tables, {split: (tuple(map(str, paths)), self._ends(split)) for split, paths in self.files.items()}


@dataclass(frozen=True)
class HubSource:
    """A set on the hub, `owner/name`; downloaded when it is first looked into."""

    name: str

    @cached_property
    def tables(self) -> dict[str, Dataset]:
        """The set's splits, memory-mapped."""
        hub = load_hub(self.name)
        found = {split: [hub[alias] for alias in aliases if alias in hub] for split, aliases in SPLIT_ALIASES.items()}
        tables = {split: candidates[0] for split, candidates in found.items() if candidates}
        if "train" not in tables:
            raise UserError(f"{self.name} on the hub has the splits {', '.join(hub)}: one must be named train")
        for table in tables.values():
            _check_columns(table.column_names, f"{self.name} on the hub")
        return tables

    def __len__(self) -> int:
        return sum(map(len, self.tables.values()))

    def fingerprint(self) -> str:
        """Changes with the content of the library's files."""
        return _fingerprint(
            {split: [Path(file["filename"]) for file in table.cache_files] for split, table in self.tables.items()}
        )

    def read(self, in_memory: bool) -> tuple[tuple[str, ...], dict[str, EncodedSplit]]:
        """As `ParquetSource.read`; the tables stay memory-mapped either way."""
        return _split_tables(self.tables, self._origins())

    def read_captions(self, in_memory: bool) -> dict[str, EncodedCaptions]:
        """As `ParquetSource.read_captions`; the tables stay memory-mapped either way."""
        return _caption_tables(self.tables, self._origins())

    @property
    def has_captions(self) -> bool:
        """Captions instead of labels."""
        return LABEL_COLUMN not in self.tables["train"].column_names

    def _origins(self) -> Origins:
        return {split: ((f"{self.name} {split}",), (len(table),)) for split, table in self.tables.items()}


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split in `folder`, or in its `data/` as in a copy of a hub repository."""
    for place in (folder, folder / "data"):
        by_name: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*.parquet")):
            by_name.setdefault(re.split(r"[-_.]", path.name)[0], []).append(path)
        found = {split: [by_name[name] for name in names if name in by_name] for split, names in SPLIT_ALIASES.items()}
        if found["train"]:
            return {split: candidates[0] for split, candidates in found.items() if candidates}
    return {}


def _fingerprint(files: dict[str, list[Path]]) -> str:
    digest = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            with path.open("rb") as file:
                digest.update(split.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _check_columns(names: Iterable[str], where: str) -> bool:
    """Whether the table has captions rather than labels. Raises `UserError` where it has neither, or no picture."""
    names = list(names)
    if not set(PICTURE_COLUMNS) & set(names) or not (LABEL_COLUMN in names or caption_columns(names)):
        raise UserError(
            f"{where} has the columns {', '.join(names)}: "
            f"it must have {' or '.join(PICTURE_COLUMNS)}, and {LABEL_COLUMN} or caption, caption_0, ..."
        )
    return LABEL_COLUMN not in names


def caption_columns(names: Iterable[str]) -> list[str]:
    """The columns that hold captions: caption, captions, caption_0, caption_1, ..."""
    return [name for name in names if re.fullmatch(r"captions?|caption_.*", name)]


def _picture_column(names: Iterable[str]) -> str:
    return next(name for name in PICTURE_COLUMNS if name in names)


def _read_parquet(paths: list[Path]) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.table import InMemoryTable

    names = pq.read_schema(paths[0]).names
    columns = [_picture_column(names), *([LABEL_COLUMN] if LABEL_COLUMN in names else caption_columns(names))]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
    return Dataset(InMemoryTable(table), fingerprint="parquet")  # its own would hash every picture


def _map_parquet(paths: list[Path]) -> Dataset:
    """As a memory-mapped Arrow table, for which the library makes a copy in its cache: Parquet has no random access."""
    from datasets import Dataset

    table = Dataset.from_parquet([str(path) for path in paths])
    assert isinstance(table, Dataset)  # not the iterable kind, which streaming=True would give
    return table


Origins = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
"""For each split the files that its rows come from, and the row after each file's last."""


def _caption_tables(tables: dict[str, Dataset], origins: Origins) -> dict[str, EncodedCaptions]:
    splits = {}
    for split, table in tables.items():
        pictures = _table_pictures(table, origins[split])
        columns = [table.data.column(name).to_pylist() for name in caption_columns(table.column_names)]
        captions = tuple(tuple(_texts(cells)) for cells in zip(*columns, strict=True))
        check_captions(captions, pictures.where)
        splits[split] = EncodedCaptions(pictures, captions)
    return splits


def _texts(cells: tuple[str | list[str] | None, ...]) -> Iterator[str]:
    """The captions in one row's cells, each a text or a list of texts; a missing cell counts as an empty caption."""
    for cell in cells:
        yield from cell if isinstance(cell, list) else [cell or ""]


def _table_pictures(table: Dataset, origin: tuple[tuple[str, ...], tuple[int, ...]]) -> TablePictures:
    column = table.select_columns([_picture_column(table.column_names)]).with_format("arrow")
    return TablePictures(column, *origin)


def _split_tables(tables: dict[str, Dataset], origins: Origins) -> tuple[tuple[str, ...], dict[str, EncodedSplit]]:
    import pyarrow.types as types
    from datasets import ClassLabel

    for split, table in tables.items():
        kind = table.data.column(LABEL_COLUMN).type
        if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            raise UserError(
                f"{origins[split][0][0]} has labels of type {kind}: they must be whole numbers or class names"
            )
    feature = tables["train"].features[LABEL_COLUMN]
    if isinstance(feature, ClassLabel):
        names, values = feature.names, list(range(len(feature.names)))
    else:
        values = sorted(value for value in tables["train"].unique(LABEL_COLUMN) if value is not None)
        names = [str(value) for value in values]
    splits = {}
    for split, table in tables.items():
        pictures = _table_pictures(table, origins[split])
        splits[split] = EncodedSplit(pictures, _encode_labels(table.data.column(LABEL_COLUMN), values, pictures))
    return tuple(names), splits


def _encode_labels(column: pa.ChunkedArray, values: Sequence[int | str], pictures: TablePictures) -> Tensor:
    """Each label's place in `values`, int64 (N,). Raises `UserError` naming the first row whose label is not there."""
    place = {value: index for index, value in enumerate(values)}
    labels = torch.tensor([place.get(value, -1) for value in column.to_pylist()], dtype=torch.int64)
    for row in (labels < 0).nonzero().flatten().tolist():
        allowed = f"one of {values[0]!r} to {values[-1]!r}, the classes of train" if values else "the name of a class"
        raise UserError(f"{pictures.where(row)} has the label {column[row].as_py()!r}: it must be {allowed}")
    return labels


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
