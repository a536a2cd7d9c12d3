"""From a dataset's name, folder or hub name to where its pictures are; no picture is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from diffmoe.config import EMBEDDED_DATASETS, HUB_DATASETS, DataConfig, UserError, dataset_name, nearest
from diffmoe.data.caption_files import find_caption_files, has_caption_files, has_table_suffix
from diffmoe.data.folders import FolderSource, has_class_folders
from diffmoe.data.hub import HubSource, check_hub
from diffmoe.data.parquet import ParquetSource, parquet_files
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.splits import ClassesAndSplits

Kind = Literal["classification", "captions"]
"""What a set teaches: pictures with labels, or with captions."""


class Source(Protocol):
    """Where a set is. Opening one reads no picture."""

    @property
    def has_captions(self) -> bool:
        """Captions instead of labels."""
        ...

    def __len__(self) -> int:
        """Pictures in all splits."""
        ...

    def fingerprint(self) -> str:
        """A name for the content, for the cache."""
        ...

    def read(self, picture: PictureSpec, in_memory: bool) -> ClassesAndSplits:
        """The splits, their pictures decoded on demand; `in_memory`: all of them will be, at once.

        Raises `UserError` naming a row whose label or captions will not do.
        """
        ...


def check_dataset(config: DataConfig) -> Kind:
    """What the set teaches. Raises `UserError` where it is not there or not laid out as one; reads no picture.

    An unknown name (with the nearest known), a folder that is missing, empty or without classes, a table without
    the columns, a hub that does not answer.
    """
    if len(sets := config.sets) > 1:
        return _check_sets(sets)
    if config.built_in:
        return "captions" if config.dataset == "shapes" else "classification"
    return "captions" if find_source(config).has_captions else "classification"


def _check_sets(sets: Sequence[DataConfig]) -> Kind:
    names = [dataset_name(one.dataset) for one in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"dataset names {twice[0]!r} twice: each of several sets must be there once")
    for one in sets:
        if one.data_dir is not None and not (place := Path(one.data_dir, dataset_name(one.dataset))).exists():
            hint = nearest(place.name, (path.name for path in place.parent.glob("*")))
            raise UserError(f"there is no {str(place)!r}{hint}: each of several sets must be in data_dir by its name")
        if check_dataset(one) == "captions":
            raise UserError(f"dataset {one.dataset!r} has captions: several sets at once must all have classes")
    return "classification"


def find_source(config: DataConfig) -> Source:
    """Where the set is: `data_dir/<dataset>`, `data_dir` itself, a folder that `dataset` names, or the hub.

    Raises `UserError` where it is nowhere, or named twice; with `data_dir` the hub is never asked.
    """
    name = config.dataset
    folder = Path(name)
    if config.data_dir is not None:
        found = _find_in(Path(config.data_dir), name)
        if "/" in name and folder.exists() and not folder.samefile(found):
            raise UserError(
                f"dataset is {name!r}, which is there, and data_dir holds {str(found)!r}: give one of the two"
            )
        return _open_place(found)
    if folder.is_file() and has_table_suffix(folder):
        return _open_place(folder)
    if folder.is_dir() and (name not in HUB_DATASETS or holds_set(folder)):
        return _open_place(folder)
    if name not in HUB_DATASETS and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        known = (*EMBEDDED_DATASETS, *HUB_DATASETS)
        raise UserError(
            f"dataset is {name!r}{nearest(name, known)}: it must be one of {', '.join(known)}, "
            "a folder or a captions table that exists, or a hub name such as owner/name"
        )
    hub_name = HUB_DATASETS.get(name, name)
    check_hub(hub_name)
    return HubSource(hub_name)


def _find_in(data_dir: Path, dataset: str) -> Path:
    name = dataset_name(dataset)
    if not data_dir.is_dir():
        raise UserError(f"data_dir is {str(data_dir)!r}: it must be a folder that exists")
    place = data_dir / name
    if place.is_dir() or (place.is_file() and has_table_suffix(place)):
        return place
    if holds_set(data_dir):
        return data_dir
    if dataset in EMBEDDED_DATASETS:
        raise UserError(
            f"data_dir is {str(data_dir)!r}, which has no {name} in it: the {name} that the program brings need no "
            f"data_dir, and a set of your own must be in {str(place)!r}"
        )
    hint = nearest(name, (path.name for path in data_dir.iterdir() if path.is_dir()))
    raise UserError(
        f"there is no {str(place)!r}{hint}: it must be there with <split>-*.parquet, train/<class>/ or a captions table"
    )


def holds_set(folder: Path) -> bool:
    """Whether a set is laid out in the folder; opens none of its files."""
    return bool(parquet_files(folder)) or has_class_folders(folder) or has_caption_files(folder)


def _open_place(place: Path) -> Source:
    """A folder, or a captions table."""
    if files := parquet_files(place):
        return ParquetSource.open(files)
    if captions := find_caption_files(place):  # before class folders: its pictures are in a folder too
        return captions
    if has_class_folders(place):
        return FolderSource.open(place)
    raise UserError(
        f"{place} holds no dataset: it must hold train-*.parquet, pictures in train/<class>/, or a captions table"
    )
