"""The data's settings, and the sets that have a name here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffmoe.config.errors import MAX_SEED, check, check_at_least, check_fraction, check_limits, expand, expanded

EMBEDDED_DATASETS = ("digits", "shapes")
"""Sets that need no download: scikit-learn's digits, and captioned shapes that the program draws."""

HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "flickr8k": "jxie/flickr8k",
}
"""Sets with a name of their own here, and the hub repository that holds each."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures: where they come from, how they are split and augmented."""

    dataset: str = "digits"
    """digits, shapes, fashion_mnist, cifar10, flickr8k, a folder DIR/train/<class>/*.jpg or with a captions table,
    or a hub name such as owner/name. Several sets of classes that one model learns: cifar10+fashion_mnist."""
    data_dir: str | None = None
    """Folder that holds <dataset>/*.parquet, <dataset>/train/<class>/* or a captions table, or is that folder; without
    it the set comes from the hub. A set of your own in it may be called digits or shapes."""
    val_fraction: float = 0.1
    """Share of train held out for validation, by class, where the set has no validation split."""
    test_fraction: float = 0.2
    """Share held out for testing, by class, where the set has no test split."""
    split_seed: int = 0
    """Seed of those splits; apart from `seed`, so that no run trains on what another one tests."""
    crop_padding: int = 0
    """Augmentation: random crop after reflecting this many pixels at each edge; 0 is off."""
    flip: bool = False
    """Augmentation: mirror half of the pictures left to right."""
    alternate_flip: bool = False
    """Augmentation: mirror each picture in every other epoch, half of them first (Jordan 2024), in the place of flip,
    which leaves it to chance."""
    erase: float = 0.0
    """Augmentation: probability that a random rectangle of a picture is blanked."""
    set_mixing: Literal["proportional", "equal"] = "proportional"
    """Of several sets: as many pictures of each as it has, or ('equal') the smaller ones repeated until all have as
    many in an epoch, give or take half of a set."""
    cutout: int = 0
    """Augmentation: blank a square of so many pixels a side in every picture; 0 is off."""
    mixup: float = 0.0
    """Augmentation: average each picture, and its label, with another one, in shares drawn from Beta(mixup, mixup); 0
    is off. For classes only."""
    cutmix: float = 0.0
    """Augmentation: put a rectangle of another picture into each, its area drawn from Beta(cutmix, cutmix); 0 is off.
    For classes only."""
    check: bool = False
    """Look at all pictures before anything else, and list all that cannot be read, instead of stopping at the first."""
    max_memory_gb: float = 4.0
    """A set larger than this, as uint8, is read in worker processes instead of being held in memory."""
    num_workers: int = 2
    """Worker processes for a set that is not held in memory."""

    def __post_init__(self) -> None:
        expand(self, "dataset", "data_dir")
        check_limits(self, split_seed=MAX_SEED)
        check_fraction(self, "val_fraction", "test_fraction", "erase")
        check(self.val_fraction > 0, "val_fraction", self.val_fraction, "over 0")
        check(self.test_fraction > 0, "test_fraction", self.test_fraction, "over 0")
        check_at_least(
            self, 0, "crop_padding", "cutout", "mixup", "cutmix", "max_memory_gb", "num_workers", "split_seed"
        )

    @property
    def mixes(self) -> bool:
        """Whether training pictures have a part of another one."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def sets(self) -> tuple[DataConfig, ...]:
        """Of each of the sets that `dataset` names; itself where that is one. A set that the program brings is taken
        from there where `data_dir` has none of its name.
        """
        if len(names := set_names(self.dataset, self.data_dir)) == 1:
            return (self,)
        brought = {name for name in EMBEDDED_DATASETS if not Path(self.data_dir or "", name).exists()}
        return tuple(
            dataclasses.replace(self, dataset=name, data_dir=None if name in brought else self.data_dir)
            for name in names
        )

    @property
    def built_in(self) -> bool:
        """Whether the program brings the set: what `data_dir` holds is the user's own, whatever it is called."""
        return self.dataset in EMBEDDED_DATASETS and self.data_dir is None


def set_names(dataset: str, data_dir: str | None = None) -> tuple[str, ...]:
    """The sets that `dataset` names, `+` between several; one where a folder, here or in `data_dir`, is called so."""
    names = dataset.split("+")
    is_one = len(names) == 1 or not all(names) or any(Path(root, dataset).exists() for root in (".", data_dir or "."))
    return (dataset,) if is_one else tuple(names)


def dataset_name(dataset: str) -> str:
    """The name that a set's files get: its own, or the last part of a path or hub name; those of several."""
    if len(names := set_names(dataset)) > 1:
        return "+".join(map(dataset_name, names))
    path = Path(expanded(dataset))
    return (path.resolve() if path.name in ("", "..") else path).name or "data"  # `.` and `..` are no names
