"""Sets in Parquet files, in the column layout of the hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.config import UserError
from diffmoe.data.captions import CaptionSplit
from diffmoe.data.labels import LABEL_COLUMN, FileLabels, encode_labels, listed_names
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.splits import SPLIT_ALIASES, ClassesAndSplits, Split, check_one_alias
from diffmoe.data.tables import Columns, TablePictures, check_task, content_fingerprint, with_captions

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


@dataclass(frozen=True)
class ParquetSource:
    """A set in Parquet files, `<split>-*.parquet`."""

    files: dict[str, list[Path]]
    """The files of each split, in order."""
    columns: dict[str, Columns]
    """Of each split: all its files have them."""

    @classmethod
    def open(cls, files: dict[str, list[Path]]) -> ParquetSource:
        """Check the files' columns, reading no row. Raises `UserError` naming a file that will not do."""
        columns: dict[str, Columns] = {}
        for split, paths in files.items():
            for path in paths:
                found = Columns.of(_read_schema(path).names, str(path))
                same = columns.setdefault(split, found)
                if (found.picture, set(found.captions)) != (same.picture, set(same.captions)):
                    raise UserError(f"{path} has {found}, but {paths[0]} has {same}: both must have the same columns")
        check_task(columns, {split: str(paths[0]) for split, paths in files.items()})
        return cls(files, columns)

    @property
    def has_captions(self) -> bool:
        """Captions instead of labels."""
        return bool(self.columns["train"].captions)

    def __len__(self) -> int:
        return sum(ends[-1] for ends in map(self._ends, self.files))

    def _ends(self, split: str) -> tuple[int, ...]:
        import pyarrow.parquet as pq

        return tuple(itertools.accumulate(pq.read_metadata(path).num_rows for path in self.files[split]))

    def fingerprint(self) -> str:
        """Changes with the files' content, and when a picture that is a file of its own is written."""
        columns = {split: columns.picture for split, columns in self.columns.items()}
        pictures = (_picture_files(path, columns[split]) for split, paths in self.files.items() for path in paths)
        return content_fingerprint(self.files, itertools.chain.from_iterable(pictures))

    def read(self, picture: PictureSpec, in_memory: bool) -> ClassesAndSplits:
        """Class names, and for each split its pictures and labels or captions. Raises `UserError` naming a bad row."""
        if self.has_captions:
            return (), self._read_captions(picture, in_memory)
        class_names, labels = encode_labels(
            {split: [_read_labels(path) for path in paths] for split, paths in self.files.items()}
        )
        return class_names, {
            split: Split(LazyImages.of(self._pictures(split, in_memory), picture), labels[split]) for split in labels
        }

    def _read_captions(self, picture: PictureSpec, in_memory: bool) -> dict[str, CaptionSplit]:
        splits = {}
        for split, paths in self.files.items():
            tables = [_read_columns(path, self.columns[split].captions) for path in paths]
            splits[split] = with_captions(self._pictures(split, in_memory), picture, tables)
        return splits

    def _pictures(self, split: str, in_memory: bool) -> TablePictures:
        paths, column = self.files[split], self.columns[split].picture
        try:
            table = _read_pictures(paths, column) if in_memory else _map_pictures(paths, column)
        except Exception as error:  # pyarrow's, or those that `datasets` wraps them in
            raise UserError(f"{paths[0].parent} cannot be read ({_one_line(error)})") from error
        return TablePictures(table.with_format("arrow"), tuple(map(str, paths)), self._ends(split))


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split in `folder`, or in its `data/` as in a copy of a hub repository.

    Raises `UserError` where a split is there under two names.
    """
    for place in (folder, folder / "data"):
        by_name: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*.parquet")):
            by_name.setdefault(re.split(r"[-_.]", path.name)[0].lower(), []).append(path)
        if "train" not in by_name:
            continue
        files = {}
        for split, aliases in SPLIT_ALIASES.items():
            found = [alias for alias in aliases if alias in by_name]
            check_one_alias(str(place), found)
            if found:
                files[split] = by_name[found[0]]
        return files
    return {}


def _read_schema(path: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} must be a Parquet file that can be read ({_one_line(error)})") from error


def _read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({_one_line(error)})") from error


def _picture_files(path: Path, column: str) -> list[Path]:
    """The pictures of a file that holds their paths; none where it holds the pictures."""
    import pyarrow.types as types

    kind = _read_schema(path).field(column).type
    if types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return []
    names = _read_columns(path, [column]).column(column).to_pylist()
    return [path.parent / name for name in names if isinstance(name, str)]


def _read_labels(path: Path) -> FileLabels:
    column = _read_columns(path, [LABEL_COLUMN]).column(LABEL_COLUMN)
    try:
        names = listed_names(_read_schema(path))
    except ValueError as error:
        raise UserError(f"{path} has metadata of `datasets` that is not valid JSON: {error}") from error
    return FileLabels(str(path), column, names)


def _read_pictures(paths: list[Path], column: str) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.table import InMemoryTable

    table = pa.concat_tables([pq.read_table(path, columns=[column]) for path in paths])
    return Dataset(InMemoryTable(table), fingerprint="parquet")  # its own would hash every picture


def _map_pictures(paths: list[Path], column: str) -> Dataset:
    """As a memory-mapped Arrow table, for which the library makes a copy in its cache: Parquet has no random access."""
    from datasets import Dataset

    table = Dataset.from_parquet([str(path) for path in paths], columns=[column])
    assert isinstance(table, Dataset)  # not the iterable kind, which streaming=True would give
    return table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
