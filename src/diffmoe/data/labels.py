"""Labels as tables hold them: a number means what its own file calls it, and a class is known by its name.

Shapes: N labels.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data.splits import check_two_classes

if TYPE_CHECKING:
    import pyarrow as pa


LABEL_COLUMN = "label"


@dataclass(frozen=True)
class FileLabels:
    """The labels of one file, or of one split on the hub."""

    where: str
    """The file's path, or the split's name."""
    column: pa.ChunkedArray
    """Whole numbers or texts, (N,)."""
    names: tuple[str, ...]
    """What the file calls its numbers 0, 1, ...; empty where it does not say."""

    def __post_init__(self) -> None:
        import pyarrow.types as types

        kind = self.column.type
        if not (types.is_integer(kind) or self.are_texts):
            raise UserError(f"{self.where} has labels of type {kind}: they must be whole numbers or class names")
        name, count = next(iter(Counter(self.names).most_common(1)), ("", 0))
        if count > 1:
            raise UserError(f"{self.where} calls {count} classes {name!r}: each must have a name of its own")

    @property
    def are_texts(self) -> bool:
        """The rows hold names themselves."""
        import pyarrow.types as types

        return types.is_string(self.column.type) or types.is_large_string(self.column.type)

    def show(self, label: int | str | None) -> int | str | None:
        """A label by its name, where it has one in this file."""
        return self.names[label] if isinstance(label, int) and 0 <= label < len(self.names) else label


@dataclass(frozen=True)
class Classes:
    """The classes of a set, as the files of its training split have them."""

    names: tuple[str, ...]
    numbers: dict[int, int]
    """The class of a number in a file that does not say what it calls it."""

    @classmethod
    def of(cls, files: Sequence[FileLabels]) -> Classes:
        """In the order in which the files list them, then, sorted, what only rows name; or the sorted numbers."""
        lists = dict.fromkeys(file.names for file in files if file.names and not file.are_texts)
        listed = dict.fromkeys(itertools.chain.from_iterable(lists))
        texts = {label for file in files if file.are_texts for label in file.column.unique().to_pylist()}
        if listed or texts - {None}:
            names = (*listed, *sorted(texts - {None} - listed.keys()))
            return cls(names, {number: number for number in range(len(listed))} if len(lists) == 1 else {})
        numbers = {label for file in files for label in file.column.unique().to_pylist()}
        values = sorted(numbers - {None})
        return cls(tuple(map(str, values)), {value: place for place, value in enumerate(values)})

    def encode(self, file: FileLabels) -> Tensor:
        """Each label's place among the classes, int64 (N,). Raises `UserError` naming the first row with another."""
        by_name = {name: place for place, name in enumerate(self.names)}
        known = by_name if file.are_texts else self.numbers
        if file.names and not file.are_texts:
            known = {number: by_name[name] for number, name in enumerate(file.names) if name in by_name}
        labels = torch.tensor([known.get(label, -1) for label in file.column.to_pylist()], dtype=torch.int64)
        for row in (labels < 0).nonzero().flatten().tolist():
            label = file.show(file.column[row].as_py())
            values = self.names if isinstance(label, str) or not known else sorted(known)
            allowed = f"one of {values[0]!r} to {values[-1]!r}, the classes of train" if values else "a class's name"
            raise UserError(f"{file.where} row {row} has the label {label!r}: it must be {allowed}")
        return labels


def encode_labels(splits: dict[str, list[FileLabels]]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The class names, and for each split the labels of its files one after another, int64 (N,). Raises `UserError`."""
    classes = Classes.of(splits["train"])
    encoded = {split: torch.cat([classes.encode(file) for file in files]) for split, files in splits.items()}
    check_two_classes(splits["train"][0].where, classes.names)
    return classes.names, encoded


def listed_names(schema: pa.Schema) -> tuple[str, ...]:
    """What a file calls its label numbers, by the metadata that `datasets` writes; empty where it does not say.

    Read here, as the library ignores them where the numbers are not of 64 bits.
    Raises `ValueError` where the metadata is damaged.
    """
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = ((metadata.get("info") or {}).get("features") or {}).get(LABEL_COLUMN)
    except (AttributeError, RecursionError) as error:
        raise ValueError("it is not laid out as the library does") from error
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return ()
    names = feature.get("names") or []
    if not isinstance(names, list):
        raise ValueError(f"the names of the classes are {names!r}, no list")
    return tuple(map(str, names))
