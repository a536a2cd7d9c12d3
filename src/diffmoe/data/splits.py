"""One split of a set, and how a split is held out of another where the set does not have it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from diffmoe.config import DataConfig, UserError
from diffmoe.data.pictures import LazyImages

SPLIT_ALIASES = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}
"""The three splits, and the names that folders, files and hub sets have for each."""

SPLIT_WORDS = frozenset({"training", "testing", "dev"}.union(*SPLIT_ALIASES.values()))
"""Names that people give to splits, whether they are read as such or not: no class is told from another by them."""

STATISTICS_SAMPLE = 5000
"""Pictures that the mean and deviation of a set read on demand are taken from."""


@dataclass(frozen=True)
class PictureSplit(ABC):
    """Pictures of one split, and what is known of each of them.

    Raises `ValueError` where the fields are not of as many pictures.
    """

    images: Tensor | LazyImages
    """uint8 (N, C, H, W), in memory or decoded on demand."""

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if values is not None and len(values) != len(self):
                raise ValueError(f"{len(self)} pictures but {len(values)} {name}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor) -> Self:
        """The pictures at `indices`, int64 (M,)."""
        return type(self)(*(_at(values, indices) for values in vars(self).values()))

    @property
    def texts(self) -> tuple[str, ...]:
        """What people wrote of the pictures, one picture after the other."""
        return ()

    @abstractmethod
    def groups(self, class_names: Sequence[str]) -> dict[str, Tensor]:
        """(N,) bool, which pictures are of each class; all are of one group where there are no labels."""

    @abstractmethod
    def digest(self) -> bytes:
        """What tells the labels or captions from others."""


def _at(values: Any, indices: Tensor) -> Any:
    if isinstance(values, LazyImages):
        return values.subset(indices)
    if values is None or isinstance(values, Tensor):
        return None if values is None else values[indices]
    return tuple(values[index] for index in indices.tolist())


@dataclass(frozen=True)
class Split(PictureSplit):
    """Pictures with labels."""

    labels: Tensor
    """int64 (N,)."""

    def groups(self, class_names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.labels == label for label, name in enumerate(class_names)}

    def digest(self) -> bytes:
        return self.labels.numpy().tobytes()


def split_of(name: str) -> str | None:
    """The split that a folder, a file or a cell of a table names, in capitals or not; None where it names none."""
    return next((split for split, aliases in SPLIT_ALIASES.items() if name.lower() in aliases), None)


def check_one_alias(where: str, found: Sequence[str]) -> None:
    """Raises `UserError` where a split is there under more than one of its names."""
    if len(found) > 1:
        raise UserError(f"{where} has both {found[0]} and {found[1]}, which are one split: keep one of them")


def check_two_classes(where: str, class_names: Sequence[str]) -> None:
    """Raises `UserError` where there is one class alone: a model could learn nothing."""
    if len(class_names) == 1:
        raise UserError(
            f"{where} has only the class {class_names[0]!r}: there must be 2 or more to tell apart, "
            "or captions instead of classes"
        )


def settings_without_effect(config: DataConfig, own_splits: Collection[str], in_memory: bool) -> dict[str, str]:
    """Of the settings that are not at their defaults those that change nothing for a set with such splits; and why."""
    reasons = {
        f"{setting}_fraction": f"{config.dataset} has a {split} split of its own"
        for setting, split in (("val", "validation"), ("test", "test"))
        if split in own_splits
    }
    if in_memory:
        reasons["num_workers"] = "the pictures are held in memory"
        if len(reasons) == 3:
            reasons["split_seed"] = f"{config.dataset} has splits of its own"
    if config.built_in:
        reasons["max_memory_gb"] = f"{config.dataset} is always held in memory"
        reasons["check"] = f"the program makes the pictures of {config.dataset}"
    return {name: reason for name, reason in reasons.items() if getattr(config, name) != getattr(DataConfig, name)}


ClassesAndSplits = tuple[tuple[str, ...], Mapping[str, PictureSplit]]
"""Class names, none where there are captions, and the splits by name."""
S = TypeVar("S", bound=PictureSplit)


def hold_out(split: S, fraction: float, seed: int, class_names: Sequence[str]) -> tuple[S, S]:
    """The rest and the part held out: `fraction` of every class, at least one picture and never all of them.

    Both keep the split's order, and depend on its labels, `fraction` and `seed` alone.
    Raises `UserError` where there is a single picture, of a class or in all.
    """
    # By hand: importing scikit-learn for it took 1.3 of the 3 s that a second start may take.
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(split), dtype=torch.bool)
    for name, of_group in split.groups(class_names).items():
        members = shuffled[of_group[shuffled]]
        if len(members) == 1:
            where = f"class {name!r}" if name else "the set"
            raise UserError(f"{where} has only 1 picture to train on: it must have 2 or more to hold some out")
        held[members[: min(max(1, round(len(members) * fraction)), len(members) - 1)]] = True
    return split.subset((~held).nonzero().flatten()), split.subset(held.nonzero().flatten())


def channel_statistics(
    images: Tensor | LazyImages, seed: int, progress: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pictures in [0, 1]; from a seeded sample of a set read on demand."""
    if isinstance(images, LazyImages):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        images = images.subset(order[:STATISTICS_SAMPLE].sort().values).load(progress)
    total = squares = torch.zeros(images.shape[1], dtype=torch.float64)
    for chunk in images.split(500):  # float32 is exact enough for the sums of so few, and twice as fast
        pixels = chunk.float().div_(255)
        total = total + pixels.sum((0, 2, 3)).double()
        squares = squares + pixels.square_().sum((0, 2, 3)).double()
    count = images.numel() / images.shape[1]
    mean = total / count
    # At least one grey level: pictures of one colour would divide by zero.
    std = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
