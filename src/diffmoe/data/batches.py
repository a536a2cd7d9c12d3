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
from diffmoe.data.augmentation import crop_and_flip, cutout, erase, is_mirrored, mix
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.splits import PictureSplit, Split


class Batch(NamedTuple):
    """Pictures and what they show."""

    images: Tensor
    """float32 (B, C, H, W), normalised."""
    labels: Tensor
    """int64 (B,)."""


class MixedBatch(NamedTuple):
    """Pictures with a part of another one of the batch, and what both show."""

    images: Tensor
    """float32 (B, C, H, W), normalised."""
    labels: Tensor
    """int64 (B,), of each picture itself."""
    other_labels: Tensor
    """int64 (B,), of the other one."""
    share: Tensor
    """float32 (B,), how much of it is itself, from 0.5 to 1."""


MIXING = 1
"""The last part of the key of what is drawn for mixing a batch."""

S = TypeVar("S", bound=PictureSplit)


class PictureBatches(ABC, Generic[S]):
    """The pictures of a split in batches, for one of `world_size` ranks.

    `batch_size` is over all ranks: each takes its share of every batch. With `shuffle` (training) all ranks have
    equally many batches, the last one filled up from the epoch's first pictures until it divides; without it
    (evaluation) every picture comes exactly once, in the split's order, and a rank may have one batch less.
    `augment`: what it says of augmentation is done to the pictures; None does nothing.
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
        if augment is not None and augment.cutout >= size:
            raise UserError(f"cutout is {augment.cutout}: it must be less than the pictures' {size} pixels")
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
            yield self._prepare(images, share, epoch, number), share

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
            try:
                yield from images.stream(shares, self.num_workers, pin_memory=self.device.type == "cuda")
            except UserError as error:
                error.told = False  # of this rank alone: the others have other pictures
                raise
        else:
            yield from (images[share] for share in shares)

    def _prepare(self, images: Tensor, rows: Tensor, epoch: int, number: int) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if self.augment is None:
            return self.picture.normalize(images)
        generator = seeded_generator(self.seed, epoch, number + 1, self.rank)  # from 1: 0 would be the key of the order
        if self.augment.crop_padding or self.augment.flip or self.augment.alternate_flip:
            images = crop_and_flip(images, self.augment, generator, is_mirrored(rows, epoch))
        images = self.picture.normalize(images)
        if self.augment.erase:
            images = erase(images, self.augment.erase, generator)
        return cutout(images, self.augment.cutout, generator) if self.augment.cutout else images


class Batches(PictureBatches[Split]):
    """The batches of a classification split."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from number `start` on, bit-equal to those of the whole epoch."""
        for images, share in self.pictures(epoch, start):
            yield Batch(images, self.split.labels[share].to(self.device, non_blocking=True))


class MixedBatches(PictureBatches[Split]):
    """Likewise, of pictures that are mixed within each batch as `augment` says."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[MixedBatch]:
        """The batches of `epoch` from number `start` on, bit-equal to those of the whole epoch."""
        assert self.augment is not None
        for number, (images, rows) in enumerate(self.pictures(epoch, start), start):
            generator = seeded_generator(self.seed, epoch, number + 1, self.rank, MIXING)
            mixed, other, share = mix(images, self.augment, generator)
            labels = (self.split.labels[rows], self.split.labels[rows[other]])
            own, others, share = (tensor.to(self.device, non_blocking=True) for tensor in (*labels, share))
            yield MixedBatch(mixed, own, others, share)


def seeded_generator(*key: int) -> Generator:
    """A generator of its own for each key; SeedSequence, as keys that differ by one must not give related draws."""
    return Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
