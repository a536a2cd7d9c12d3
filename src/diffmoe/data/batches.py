"""Splits become batches: in an order, and with an augmentation, that are functions of the seed and the epoch alone.

So any batch of any epoch can be made again, which is what an exact resume in mid-epoch takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from diffmoe.config import DataConfig, UserError
from diffmoe.data.augmentation import crop_and_flip, erase
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.splits import PictureSplit, Split


class Batch(NamedTuple):
    """Pictures and what they show."""

    images: Tensor
    """float32 (B, C, H, W), normalised."""
    labels: Tensor
    """int64 (B,)."""


S = TypeVar("S", bound=PictureSplit)


class PictureBatches(ABC, Generic[S]):
    """The pictures of a split in batches, for one of `world_size` ranks.

    `batch_size` is over all ranks: each takes its share of every batch. With `shuffle` (training) all ranks have
    equally many batches, the last one filled up from the epoch's first pictures until it divides; without it
    (evaluation) every picture comes exactly once, in the split's order, and a rank may have one batch less.
    `augment`: training's `crop_padding`, `flip` and `erase`; None does nothing.
    """

    def __init__(
        self,
        split: S,
        batch_size: int,
        *,
        picture: PictureSpec,
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        seed: int = 0,
        augment: DataConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        if shuffle and batch_size % world_size:
            raise UserError(
                f"batch_size is {batch_size}: it must be a multiple of the {world_size} devices that share it"
            )
        size = split.images.shape[-1]
        if augment is not None and augment.crop_padding >= size:
            raise UserError(f"crop_padding is {augment.crop_padding}: it must be less than the pictures' {size} pixels")
        self.split, self.batch_size, self.device = split, batch_size, torch.device(device)
        self.picture = picture
        self.shuffle, self.seed, self.augment = shuffle, seed, augment
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return len(self._shares(torch.arange(len(self.split))))

    @abstractmethod
    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        """The batches of `epoch` from number `start` on, bit-equal to those of the whole epoch; pictures first."""

    def pictures(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each batch of `epoch` from number `start` on: float32 (B, C, H, W), normalised; its rows, int64 (B,)."""
        order = torch.arange(len(self.split))
        if self.shuffle:
            order = torch.randperm(len(self.split), generator=seeded_generator(self.seed, epoch))
        shares = self._shares(order)[start:]
        for number, (images, share) in enumerate(zip(self._fetch(shares), shares, strict=True), start):
            yield self._prepare(images, epoch, number), share

    def _shares(self, order: Tensor) -> list[Tensor]:
        """The indices that this rank has of each batch."""
        if self.shuffle:
            missing = -len(order) % self.world_size
            order = torch.cat([order, order.repeat(self.world_size)[:missing]])
        shares = [batch[self.rank :: self.world_size] for batch in order.split(self.batch_size)]
        return [share for share in shares if len(share)]

    def _fetch(self, shares: list[Tensor]) -> Iterator[Tensor]:
        images = self.split.images
        if isinstance(images, LazyImages):
            yield from images.stream(shares, self.num_workers, pin_memory=self.device.type == "cuda")
        else:
            yield from (images[share] for share in shares)

    def _prepare(self, images: Tensor, epoch: int, number: int) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if self.augment is None:
            return self.picture.normalize(images)
        generator = seeded_generator(self.seed, epoch, number + 1, self.rank)  # from 1: 0 would be the key of the order
        if self.augment.crop_padding or self.augment.flip:
            images = crop_and_flip(images, self.augment, generator)
        images = self.picture.normalize(images)
        return erase(images, self.augment.erase, generator) if self.augment.erase else images


class Batches(PictureBatches[Split]):
    """The batches of a classification split."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from number `start` on, bit-equal to those of the whole epoch."""
        for images, share in self.pictures(epoch, start):
            yield Batch(images, self.split.labels[share].to(self.device, non_blocking=True))


def seeded_generator(*key: int) -> Generator:
    """A generator of its own for each key; SeedSequence, as keys that differ by one must not give related draws."""
    return Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
