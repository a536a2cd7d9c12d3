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

from diffmoe.config import UserError
from diffmoe.data.captions import CaptionSplit, captions_in, check_captions
from diffmoe.data.folders import file_status
from diffmoe.data.hub import load_hub
from diffmoe.data.labels import LABEL_COLUMN, FileLabels, encode_labels, listed_names
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.splits import SPLIT_ALIASES, ClassesAndSplits, Split, check_one_alias

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
        try:
            cells = table.column(0).to_pylist() if rows else []
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(rows[0])}, or one after it, has a path that is no UTF-8: mend it") from error
        return [self._picture(cell, row) for cell, row in zip(cells, rows, strict=True)]

    def _picture(self, cell: dict[str, Any] | bytes | str | None, row: int) -> bytes | Path:
        encoded, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if isinstance(encoded, str):
            return Path(self.files[self._file(row)]).parent / encoded
        if isinstance(encoded, bytes):
            return encoded
        if encoded is not None or not isinstance(path, str):
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
        for name in (pictures[0], *(captions or [LABEL_COLUMN])):
            if names.count(name) > 1:
                raise UserError(f"{where} has the column {name} more than once: each must have its own name")
        return cls(pictures[0], captions)

    def __str__(self) -> str:
        return ", ".join((self.picture, *(self.captions or [LABEL_COLUMN])))


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
                schema = _read_schema(path)
                found = Columns.of(schema.names, str(path))
                _check_caption_types(schema, found.captions, str(path))
                same = columns.setdefault(split, found)
                if (found.picture, set(found.captions)) != (same.picture, set(same.captions)):
                    raise UserError(f"{path} has {found}, but {paths[0]} has {same}: both must have the same columns")
        _check_task(columns, {split: str(paths[0]) for split, paths in files.items()})
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

    def left_out(self) -> Iterator[str]:
        """The files of no split that is read, in a line."""
        folder, read = self.files["train"][0].parent, set(itertools.chain.from_iterable(self.files.values()))
        if others := sorted(path.name for path in folder.glob("*.parquet") if path not in read):
            yield (
                f"{folder} has Parquet files that are not read ({len(others):,}), such as {others[0]}: "
                f"a file's name must begin with {', '.join(SPLIT_ALIASES)}"
            )

    def fingerprint(self) -> str:
        """Changes with the files' content, and when a picture that is a file of its own is written."""
        columns = {split: columns.picture for split, columns in self.columns.items()}
        pictures = (_picture_files(path, columns[split]) for split, paths in self.files.items() for path in paths)
        return _fingerprint(self.files, itertools.chain.from_iterable(pictures))

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
            splits[split] = _with_captions(self._pictures(split, in_memory), picture, tables)
        return splits

    def _pictures(self, split: str, in_memory: bool) -> TablePictures:
        paths, column = self.files[split], self.columns[split].picture
        try:
            table = _read_pictures(paths, column) if in_memory else _map_pictures(paths, column)
        except Exception as error:  # pyarrow's, or those that `datasets` wraps them in
            raise UserError(f"{paths[0].parent} cannot be read ({_one_line(error)})") from error
        return TablePictures(table.with_format("arrow"), tuple(map(str, paths)), self._ends(split))


@dataclass(frozen=True)
class HubSource:
    """A set on the hub, `owner/name`; downloaded when it is first looked into."""

    name: str

    @cached_property
    def splits(self) -> dict[str, Dataset]:
        """All of the set's splits, memory-mapped, as the hub calls them."""
        return load_hub(self.name)

    @cached_property
    def tables(self) -> dict[str, Dataset]:
        """The splits that are read. Raises `UserError` where one will not do."""
        import pyarrow.types as types

        hub = self.splits
        found = {split: [hub[alias] for alias in aliases if alias in hub] for split, aliases in SPLIT_ALIASES.items()}
        tables = {split: candidates[0] for split, candidates in found.items() if candidates}
        if "train" not in tables:
            raise UserError(f"{self.name} on the hub has the splits {', '.join(hub)}: one must be named train")
        columns = {split: Columns.of(table.column_names, f"{self.name} {split}") for split, table in tables.items()}
        _check_task(columns, {split: f"{self.name} {split}" for split in tables})
        for split, found in columns.items():
            schema = tables[split].features.arrow_schema
            _check_caption_types(schema, found.captions, f"{self.name} {split}")
            if not types.is_struct(kind := schema.field(found.picture).type) and not types.is_binary(kind):
                raise UserError(
                    f"{self.name} {split} has {found.picture} of type {kind}: it must hold the pictures themselves; "
                    f"download the set with its files, and read it with --data_dir DIR"
                )
        return tables

    def __len__(self) -> int:
        return sum(map(len, self.tables.values()))

    def left_out(self) -> Iterator[str]:
        """The splits that are not read, in a line."""
        if others := sorted(set(self.splits).difference(*SPLIT_ALIASES.values())):
            yield f"{self.name} on the hub has splits that are not read: {', '.join(others)}"

    def fingerprint(self) -> str:
        """Changes with the content of the library's files."""
        return _fingerprint(
            {split: [Path(file["filename"]) for file in table.cache_files] for split, table in self.tables.items()}
        )

    def read(self, picture: PictureSpec, in_memory: bool) -> ClassesAndSplits:
        """As `ParquetSource.read`; the tables stay memory-mapped either way."""
        if self.has_captions:
            return (), {
                split: _with_captions(
                    self._pictures(split), picture, [table.data.select(self._columns(split).captions)]
                )
                for split, table in self.tables.items()
            }
        files = {}
        for split, table in self.tables.items():
            names = listed_names(table.features.arrow_schema)
            files[split] = [FileLabels(f"{self.name} {split}", table.data.column(LABEL_COLUMN), names)]
        class_names, labels = encode_labels(files)
        return class_names, {
            split: Split(LazyImages.of(self._pictures(split), picture), labels[split]) for split in labels
        }

    @property
    def has_captions(self) -> bool:
        """Captions instead of labels."""
        return bool(self._columns("train").captions)

    def _columns(self, split: str) -> Columns:
        return Columns.of(self.tables[split].column_names, f"{self.name} {split}")

    def _pictures(self, split: str) -> TablePictures:
        column = self.tables[split].select_columns([self._columns(split).picture]).with_format("arrow")
        return TablePictures(column, (f"{self.name} {split}",), (len(column),))


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


def _fingerprint(files: dict[str, list[Path]], pictures: Iterable[Path] = ()) -> str:
    digest = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            with path.open("rb") as file:
                digest.update(split.encode() + hashlib.file_digest(file, "sha256").digest())
    for path in pictures:
        status = file_status(path)
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _check_task(columns: dict[str, Columns], where: dict[str, str]) -> None:
    """Raises `UserError` naming a split that has labels where train has captions, or the other way round."""
    train = columns["train"]
    for split, found in columns.items():
        if bool(found.captions) != bool(train.captions):
            raise UserError(f"{where[split]} has {found}, but {where['train']} has {train}: both must be of one kind")


def _check_caption_types(schema: pa.Schema, captions: Iterable[str], where: str) -> None:
    """Raises `UserError` naming a column that holds neither texts nor lists of texts."""
    import pyarrow.types as types

    for name in captions:
        kind = held = schema.field(name).type
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            held = kind.value_type
        if not (
            types.is_string(held) or types.is_large_string(held) or types.is_string_view(held) or types.is_null(held)
        ):
            raise UserError(f"{where} has {name} of type {kind}: captions must be texts, or lists of texts")


def caption_columns(names: Iterable[str]) -> list[str]:
    """The columns that hold captions: caption, captions, caption_0, caption_1, ..."""
    return [name for name in names if re.fullmatch(r"captions?|caption_.*", name)]


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
        table = pq.read_table(path, columns=list(columns))
        table.validate(full=True)  # texts that are no UTF-8 among others
        return table
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
        raise UserError(f"{path} has metadata of `datasets` that will not do: {error}") from error
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


def _with_captions(pictures: TablePictures, picture: PictureSpec, tables: Iterable[pa.Table]) -> CaptionSplit:
    """Pictures with the captions in the rows of tables that follow one another. Raises `UserError` naming a bad row."""
    rows = itertools.chain.from_iterable(zip(*(c.to_pylist() for c in table.columns), strict=True) for table in tables)
    captions = tuple(tuple(captions_in(cells)) for cells in rows)
    check_captions(captions, pictures.where)
    return CaptionSplit(LazyImages.of(pictures, picture), captions)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
