"""One split of a set, and how a split is held out of another where the set does not have it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.config import DataConfig, UserError
from diffmoe.data.pictures import LazyImages, Pictures

SPLIT_ALIASES = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}
"""The three splits, and the names that folders, files and hub sets have for each."""

STATISTICS_SAMPLE = 5000
"""Pictures that the mean and deviation of a set read on demand are taken from."""


class EncodedSplit(NamedTuple):
    """What a source of labelled pictures gives: one split, not decoded yet."""

    pictures: Pictures
    labels: Tensor
    """int64 (N,)."""


class EncodedCaptions(NamedTuple):
    """What a source of captioned pictures gives: one split, not decoded yet."""

    pictures: Pictures
    captions: tuple[tuple[str, ...], ...]
    """For each picture its captions."""


@dataclass(frozen=True)
class Split:
    """Pictures of one split."""

    images: Tensor | LazyImages
    """uint8 (N, C, H, W), in memory or decoded on demand."""
    labels: Tensor
    """int64 (N,)."""

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} pictures but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Split:
        """The pictures at `indices`, int64 (M,)."""
        images = self.images.subset(indices) if isinstance(self.images, LazyImages) else self.images[indices]
        return Split(images, self.labels[indices])


def check_one_alias(where: str, found: Sequence[str]) -> None:
    """Raises `UserError` where a split is there under more than one of its names."""
    if len(found) > 1:
        raise UserError(f"{where} has both {found[0]} and {found[1]}, which are one split: keep one of them")


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
    return {name: reason for name, reason in reasons.items() if getattr(config, name) != getattr(DataConfig, name)}


def hold_out(split: Split, fraction: float, seed: int, class_names: Sequence[str]) -> tuple[Split, Split]:
    """The rest and the part held out: `fraction` of every class, at least one picture and never all of them.

    Both keep the split's order, and depend on its labels, `fraction` and `seed` alone.
    Raises `UserError` where a class has a single picture.
    """
    # By hand: importing scikit-learn for it took 1.3 of the 3 s that a second start may take.
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(split), dtype=torch.bool)
    for label, name in enumerate(class_names):
        members = shuffled[split.labels[shuffled] == label]
        if len(members) == 1:
            raise UserError(f"class {name!r} has only 1 picture to train on: it must have 2 or more to hold some out")
        held[members[: min(max(1, round(len(members) * fraction)), len(members) - 1)]] = True
    return split.subset((~held).nonzero().flatten()), split.subset(held.nonzero().flatten())


def hold_out_indices(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rest and the part held out of `count` pictures, int64, in order; by `fraction` and `seed` alone.

    Raises `UserError` where there are fewer than 2.
    """
    if count < 2:
        raise UserError(f"there is only {count} picture to train on: it takes 2 or more to hold some out")
    held = torch.zeros(count, dtype=torch.bool)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held[shuffled[: min(max(1, round(count * fraction)), count - 1)]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


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
