"""A set made ready: decoded once, cached, split three ways."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe.config import EMBEDDED_DATASETS, DataConfig, UserError, dataset_name
from diffmoe.data import shapes
from diffmoe.data.cache import cache_path, read_cache, write_cache
from diffmoe.data.captions import CaptionSplit
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.sources import find_source, holds_set
from diffmoe.data.splits import (
    SPLIT_ALIASES,
    ClassesAndSplits,
    PictureSplit,
    Split,
    channel_statistics,
    hold_out,
    settings_without_effect,
)

log = logging.getLogger(__name__)

FINGERPRINT_SAMPLE = 64
"""Pictures of the training split that a fingerprint looks at."""


UNEVEN = 3
"""Where a class has so many times the training pictures of another one, that is said."""


class Part(NamedTuple):
    """One of several sets that make one."""

    name: str
    known_as: str
    class_names: tuple[str, ...]
    """Its own; in the whole set they follow those of the parts before it, with its name before each."""


@dataclass(frozen=True)
class Dataset:
    """Pictures with labels or with captions, in three splits that share no picture."""

    name: str
    known_as: str
    """The name, where what the program knows of a set so called holds for this one: not for one's own `digits`."""
    class_names: tuple[str, ...]
    """Empty where the pictures have captions."""
    train: Any
    """This and the others: `Split`, or `CaptionSplit`."""
    validation: Any
    test: Any
    picture: PictureSpec
    """With the statistics of the training split."""
    parts: tuple[Part, ...] = ()
    """The sets that it was made of, where these are several."""

    def summary(self) -> str:
        """In one line."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self._splits().items())
        told = (
            f"{len(self.class_names)} classes" if self.class_names else f"{len(self.train.texts):,} training captions"
        )
        return f"{self.name}: {counts} pictures; {told}{self._imbalance()}"

    def _imbalance(self) -> str:
        """Where it is worth a word: which class has how many times the training pictures of which."""
        if not self.class_names:
            return ""
        counts = self.train.labels.bincount(minlength=len(self.class_names))
        least, most = int(counts.argmin()), int(counts.argmax())
        if counts[most] < UNEVEN * counts[least]:
            return ""
        ends = (f"{self.class_names[place]} {int(counts[place]):,}" for place in (most, least))
        return f", from {' to '.join(ends)} pictures: --class_weights balanced counts each class the same"

    def fingerprint(self) -> str:
        """What tells the data from other data: classes, labels or captions, and some of the pictures.

        Of the content, not of where it is: a set that was copied elsewhere is the same.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for name, split in self._splits().items():
            digest.update(f"{name} {len(split)}\n".encode() + split.digest())
        rows = torch.linspace(0, len(self.train) - 1, min(FINGERPRINT_SAMPLE, len(self.train))).long()
        digest.update(self.train.images[rows].numpy().tobytes())
        return digest.hexdigest()[:32]

    def _splits(self) -> dict[str, PictureSplit]:
        return {"training": self.train, "validation": self.validation, "test": self.test}


def load_dataset(config: DataConfig, picture: PictureSpec, progress: bool = True) -> Dataset:
    """Find a set, or several, and make it ready: decoded to uint8 (C, size, size), in three splits.

    A set over `config.max_memory_gb` is not decoded: its pictures are `LazyImages`. Validation and test pictures are
    held out of train where the set does not have them, by `config.split_seed` alone.
    Raises `UserError` where the set or one of its pictures will not do.
    """
    if len(sets := config.sets) > 1:
        return _together(config, [load_dataset(one, picture, progress) for one in sets])
    class_names, splits = _make(config, picture) if config.built_in else _read(config, picture, progress)
    # A folder may be called what is no UTF-8: no tokenizer reads that, and no file takes it.
    named = (name.encode("utf-8", "surrogateescape") for name in class_names)
    class_names = tuple(name.decode("utf-8", "backslashreplace") for name in named)
    _check_splits(config, splits, progress)
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:
        train, test = hold_out(train, config.test_fraction, config.split_seed, class_names)
    if validation is None:
        train, validation = hold_out(train, config.val_fraction, config.split_seed, class_names)
    statistics = channel_statistics(train.images, config.split_seed, progress)
    name = dataset_name(config.dataset)
    known_as = name if config.built_in or name not in EMBEDDED_DATASETS else ""
    spec = PictureSpec(picture.size, picture.channels, *statistics)
    return Dataset(name, known_as, class_names, train, validation, test, spec)


def _together(config: DataConfig, sets: Sequence[Dataset]) -> Dataset:
    """One set of several, whose classes are those of all: a model learns to tell them all apart, told no set's name."""
    most = max(len(one.train) for one in sets)
    starts = itertools.accumulate((len(one.class_names) for one in sets), initial=0)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "validation": [], "test": []}
    for one, start in zip(sets, starts, strict=False):
        for name, found in parts.items():
            split: Split = getattr(one, name)
            if not isinstance(split.images, Tensor):
                raise UserError(f"dataset {one.name!r} is over max_memory_gb: several sets at once must fit in memory")
            times = round(most / len(split)) if name == "train" and config.set_mixing == "equal" else 1
            rows = torch.arange(len(split)).repeat(times)
            found.append((split.images[rows], split.labels[rows] + start))
    train, validation, test = (Split(*map(torch.cat, zip(*found, strict=True))) for found in parts.values())
    picture = sets[0].picture
    spec = PictureSpec(picture.size, picture.channels, *channel_statistics(train.images, config.split_seed))
    class_names = tuple(f"{one.name}: {name}" for one in sets for name in one.class_names)
    made_of = tuple(Part(one.name, one.known_as, one.class_names) for one in sets)
    return Dataset(dataset_name(config.dataset), "", class_names, train, validation, test, spec, made_of)


def _make(config: DataConfig, picture: PictureSpec) -> ClassesAndSplits:
    """A set that the program brings."""
    if config.dataset == "shapes":
        return (), dict(shapes.draw_splits(picture))
    return _read_digits(picture)


def _read_digits(picture: PictureSpec) -> ClassesAndSplits:
    """scikit-learn's digits: 1,797 pictures of 8x8 with values from 0 to 16."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pictures = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = torch.stack([picture.fit(Image.fromarray(grey)) for grey in pictures])
    return tuple("0123456789"), {"train": Split(images, torch.from_numpy(labels).long())}


def _read(config: DataConfig, picture: PictureSpec, progress: bool) -> ClassesAndSplits:
    source = find_source(config)
    for line in source.left_out() if progress else ():
        log.warning(line)
    if config.check:
        _check_pictures(config, source.read(picture, in_memory=False)[1], progress)
    if len(source) * picture.channels * picture.size**2 > config.max_memory_gb * 1e9:
        return source.read(picture, in_memory=False)
    path = cache_path(source.fingerprint(), picture)
    if (cached := read_cache(path)) is not None:
        return _from_cache(*cached)
    class_names, lazy = source.read(picture, in_memory=True)
    splits = {name: dataclasses.replace(split, images=_all(split.images, progress)) for name, split in lazy.items()}
    write_cache(path, *_to_cache(class_names, splits))
    return class_names, splits


def _check_pictures(config: DataConfig, splits: Mapping[str, PictureSplit], progress: bool) -> None:
    """Lists, with what is wrong, all pictures that cannot be read, and raises `UserError` where there are any."""
    found = [
        one
        for split in splits.values()
        if isinstance(split.images, LazyImages)
        for one in split.images.unreadable(progress)
    ]
    if not found:
        return
    by_reason: dict[str, list[str]] = {}
    for where, reason in found:
        by_reason.setdefault(reason, []).append(where)
    for reason, places in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        log.warning("%d picture%s: %s", len(places), "" if len(places) == 1 else "s", reason)
        for where in places:
            log.warning("    %s", where)
    total = sum(map(len, splits.values()))
    raise UserError(
        f"dataset {config.dataset!r}: {len(found):,} of {total:,} pictures cannot be read: replace or remove them"
    )


def _all(images: Tensor | LazyImages, progress: bool) -> Tensor:
    return images.load(progress) if isinstance(images, LazyImages) else images


def _to_cache(
    class_names: tuple[str, ...], splits: Mapping[str, PictureSplit]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    fields = [(f"{name}.{field}", value) for name, split in splits.items() for field, value in vars(split).items()]
    tensors = {name: value for name, value in fields if isinstance(value, Tensor)}
    captions = {name: split.captions for name, split in splits.items() if isinstance(split, CaptionSplit)}
    return tensors, {"class_names": json.dumps(class_names), "captions": json.dumps(captions)}


def _from_cache(tensors: dict[str, Tensor], texts: dict[str, str]) -> ClassesAndSplits:
    captions = json.loads(texts["captions"])
    splits: dict[str, PictureSplit] = {}
    for name in SPLIT_ALIASES:
        if (images := tensors.get(f"{name}.images")) is None:
            continue
        if name in captions:
            splits[name] = CaptionSplit(images, tuple(map(tuple, captions[name])))
        else:
            splits[name] = Split(images, tensors[f"{name}.labels"])
    return tuple(json.loads(texts["class_names"])), splits


def _check_splits(config: DataConfig, splits: Mapping[str, PictureSplit], progress: bool) -> None:
    """Raises `UserError` where one is empty. Says, on the process that shows progress, what changes nothing here."""
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"dataset {config.dataset!r} has an empty {name} split: it must hold pictures")
    if not progress:
        return
    if config.built_in and Path(config.dataset).is_dir() and holds_set(Path(config.dataset)):
        name = config.dataset
        log.warning("%s is the set that the program brings; --dataset ./%s reads the folder %s here", name, name, name)
    in_memory = isinstance(splits["train"].images, Tensor)
    for name, reason in settings_without_effect(config, splits.keys(), in_memory).items():
        log.warning("%s is %r and changes nothing: %s", name, getattr(config, name), reason)
