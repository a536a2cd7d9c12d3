"""From a dataset's name, folder or hub name to its pictures: found, decoded once, cached, split three ways."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from diffmoe.config import EMBEDDED_DATASETS, HUB_DATASETS, DataConfig, UserError, dataset_name, nearest
from diffmoe.data import shapes
from diffmoe.data.cache import cache_path, read_cache, write_cache
from diffmoe.data.caption_files import find_caption_files, has_caption_files, has_table_suffix
from diffmoe.data.captions import CaptionDataset, CaptionSplit
from diffmoe.data.folders import FolderSource, has_class_folders
from diffmoe.data.hub import check_hub
from diffmoe.data.pictures import LazyImages, check_channels, read_picture, to_tensor
from diffmoe.data.splits import (
    SPLIT_ALIASES,
    EncodedCaptions,
    EncodedSplit,
    Split,
    channel_statistics,
    hold_out,
    hold_out_indices,
    settings_without_effect,
)
from diffmoe.data.tables import HubSource, ParquetSource, parquet_files

log = logging.getLogger(__name__)

__all__ = ["ImageDataset", "Split", "Task", "check_dataset", "load_dataset", "read_picture"]

Task = Literal["classification", "captions"]
"""What a set teaches: pictures with labels, or with captions."""


@dataclass(frozen=True)
class ImageDataset:
    """A classification set, in three disjoint splits."""

    name: str
    known_as: str
    """The name, where what the program knows of a set so called holds for this one: not for one's own `digits`."""
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    """Of each channel over the training split, pictures in [0, 1]."""
    std: tuple[float, ...]
    """Likewise."""


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


class LabelledSource(Source, Protocol):
    """One of pictures with labels."""

    def read(self, in_memory: bool) -> tuple[tuple[str, ...], dict[str, EncodedSplit]]:
        """Class names, and the splits. Raises `UserError` naming a row whose label will not do."""
        ...


class CaptionedSource(Source, Protocol):
    """One of pictures with captions."""

    def read_captions(self, in_memory: bool) -> dict[str, EncodedCaptions]:
        """The splits. Raises `UserError` naming a picture whose captions will not do."""
        ...


def check_dataset(config: DataConfig) -> Task:
    """What the set teaches. Raises `UserError` where it is not there or not laid out as one; reads no picture.

    An unknown name (with the nearest known), a folder that is missing, empty or without classes, a table without
    the columns, a hub that does not answer.
    """
    return _open(config)[0]


def _open(config: DataConfig, wanted: Task | None = None) -> tuple[Task, Source | None]:
    """What the set teaches, which must be `wanted`, and where it is: None for one that the program makes."""
    source = None if config.built_in else find_source(config)
    has_captions = config.dataset == "shapes" if source is None else source.has_captions
    task: Task = "captions" if has_captions else "classification"
    if wanted is not None and task != wanted:
        raise UserError(f"dataset {config.dataset!r} is for {task}: {wanted} needs one with other columns")
    return task, source


def load_dataset(config: DataConfig, *, img_size: int, in_channels: int, progress: bool = True) -> ImageDataset:
    """Find a set with labels and make it ready: decoded to uint8 (C, img_size, img_size), in three splits.

    A set over `config.max_memory_gb` is not decoded: its pictures are `LazyImages`. Validation and test pictures are
    held out of train where the set does not have them, by `config.split_seed` alone.
    Raises `UserError` where the set or one of its pictures will not do.
    """
    check_channels(in_channels)
    _, found = _open(config, "classification")
    if found is None:
        return _assemble(config, *_read_digits(img_size, in_channels), progress)
    source = cast(LabelledSource, found)
    if _fits_in_memory(source, config, img_size, in_channels):
        return _assemble(config, *_decode_source(source, img_size, in_channels, progress), progress)
    class_names, encoded = source.read(in_memory=False)
    splits = {
        name: Split(LazyImages.of(pictures, img_size, in_channels), labels)
        for name, (pictures, labels) in encoded.items()
    }
    return _assemble(config, class_names, splits, progress)


def load_captions(config: DataConfig, *, img_size: int, in_channels: int, progress: bool = True) -> CaptionDataset:
    """Find a set with captions and make it ready, as `load_dataset` does one with labels."""
    check_channels(in_channels)
    _, found = _open(config, "captions")
    if found is None:
        return _assemble_captions(config, shapes.draw_splits(img_size, in_channels), progress)
    source = cast(CaptionedSource, found)
    if _fits_in_memory(source, config, img_size, in_channels):
        return _assemble_captions(config, _decode_captions(source, img_size, in_channels, progress), progress)
    splits = {
        name: CaptionSplit(LazyImages.of(pictures, img_size, in_channels), captions)
        for name, (pictures, captions) in source.read_captions(in_memory=False).items()
    }
    return _assemble_captions(config, splits, progress)


def _fits_in_memory(source: Source, config: DataConfig, img_size: int, in_channels: int) -> bool:
    return len(source) * in_channels * img_size**2 <= config.max_memory_gb * 1e9


def find_source(config: DataConfig) -> Source:
    """Where the set is: `data_dir/<dataset>`, `data_dir` itself, a folder that `dataset` names, or the hub.

    Raises `UserError` where it is nowhere, or named twice; with `data_dir` the hub is never asked.
    """
    name = config.dataset
    folder = Path(name).expanduser()
    if config.data_dir is not None:
        found = _find_in(Path(config.data_dir).expanduser(), name)
        if "/" in name and folder.exists() and not folder.samefile(found):
            raise UserError(
                f"dataset is {name!r}, which is there, and data_dir holds {str(found)!r}: give one of the two"
            )
        return _open_place(found)
    if folder.is_file() and has_table_suffix(folder):
        return _open_place(folder)
    if folder.is_dir() and (name not in HUB_DATASETS or _holds_set(folder)):
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
    if _holds_set(data_dir):
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


def _holds_set(folder: Path) -> bool:
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


def _decode_source(
    source: LabelledSource, img_size: int, in_channels: int, progress: bool
) -> tuple[tuple[str, ...], dict[str, Split]]:
    path = cache_path(source.fingerprint(), img_size=img_size, in_channels=in_channels)
    if (cached := read_cache(path)) is not None:
        tensors, metadata = cached
        return tuple(json.loads(metadata["class_names"])), _splits_of(tensors)
    class_names, encoded = source.read(in_memory=True)
    tensors = {}
    for name, (pictures, labels) in encoded.items():
        tensors[f"{name}.images"] = LazyImages.of(pictures, img_size, in_channels).load(progress)
        tensors[f"{name}.labels"] = labels
    write_cache(path, tensors, {"class_names": json.dumps(class_names)})
    return class_names, _splits_of(tensors)


def _decode_captions(
    source: CaptionedSource, img_size: int, in_channels: int, progress: bool
) -> dict[str, CaptionSplit]:
    path = cache_path(source.fingerprint(), img_size=img_size, in_channels=in_channels)
    if (cached := read_cache(path)) is not None:
        tensors, metadata = cached
        captions = {name: tuple(map(tuple, texts)) for name, texts in json.loads(metadata["captions"]).items()}
    else:
        encoded = source.read_captions(in_memory=True)
        captions = {name: split.captions for name, split in encoded.items()}
        tensors = {
            name: LazyImages.of(split.pictures, img_size, in_channels).load(progress) for name, split in encoded.items()
        }
        write_cache(path, tensors, {"captions": json.dumps(captions)})
    return {name: CaptionSplit(tensors[name], texts) for name, texts in captions.items()}


def _splits_of(tensors: dict[str, Tensor]) -> dict[str, Split]:
    names = [name for name in SPLIT_ALIASES if f"{name}.labels" in tensors]
    return {name: Split(tensors[f"{name}.images"], tensors[f"{name}.labels"]) for name in names}


def _read_digits(img_size: int, in_channels: int) -> tuple[tuple[str, ...], dict[str, Split]]:
    """scikit-learn's digits: 1,797 pictures of 8x8 with values from 0 to 16."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pictures = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = torch.stack([to_tensor(Image.fromarray(picture), img_size, in_channels) for picture in pictures])
    return tuple("0123456789"), {"train": Split(images, torch.from_numpy(labels).long())}


def _assemble(
    config: DataConfig, class_names: tuple[str, ...], splits: dict[str, Split], progress: bool
) -> ImageDataset:
    _check_splits(config, splits, progress)
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:
        train, test = hold_out(train, config.test_fraction, config.split_seed, class_names)
    if validation is None:
        train, validation = hold_out(train, config.val_fraction, config.split_seed, class_names)
    mean, std = channel_statistics(train.images, config.split_seed, progress)
    return ImageDataset(*_names(config), class_names, train, validation, test, mean, std)


def _assemble_captions(config: DataConfig, splits: dict[str, CaptionSplit], progress: bool) -> CaptionDataset:
    _check_splits(config, splits, progress)
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:
        train, test = map(train.subset, hold_out_indices(len(train), config.test_fraction, config.split_seed))
    if validation is None:
        train, validation = map(train.subset, hold_out_indices(len(train), config.val_fraction, config.split_seed))
    mean, std = channel_statistics(train.images, config.split_seed, progress)
    return CaptionDataset(*_names(config), train, validation, test, mean, std)


def _names(config: DataConfig) -> tuple[str, str]:
    """`name` and `known_as`."""
    name = dataset_name(config.dataset)
    return name, name if config.built_in or name not in EMBEDDED_DATASETS else ""


def _check_splits(config: DataConfig, splits: Mapping[str, Split | CaptionSplit], progress: bool) -> None:
    """Raises `UserError` where one is empty. Says, on the process that shows progress, what changes nothing here."""
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"dataset {config.dataset!r} has an empty {name} split: it must hold pictures")
    if not progress:
        return
    if config.built_in and Path(config.dataset).is_dir() and _holds_set(Path(config.dataset)):
        name = config.dataset
        log.warning("%s is the set that the program brings; --dataset ./%s reads the folder %s here", name, name, name)
    in_memory = isinstance(splits["train"].images, Tensor)
    for name, reason in settings_without_effect(config, splits.keys(), in_memory).items():
        log.warning("%s is %r and changes nothing: %s", name, getattr(config, name), reason)
