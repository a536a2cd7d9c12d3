"""Smaller pictures in the first half of training: they cost less, and what is learned of them is the coarse half."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from diffmoe.config import ModelConfig, TrainingConfig


def picture_size(step: float, total_steps: int, config: TrainingConfig, model: ModelConfig) -> int | None:
    """Height and width that the pictures of optimizer step `step` (from 0) are brought to; None: they stay.

    In the first half of the steps start_size of img_size, to the nearest whole number of patches, at least one.
    """
    if config.start_size == 1 or 2 * step >= total_steps:
        return None
    return max(1, round(config.start_size * model.img_size / model.patch_size)) * model.patch_size


def resized(batch: Sequence[Tensor], size: int | None) -> Sequence[Tensor]:
    """A batch, pictures (B, C, H, W) first, with these at size x size; the rest, and with None all, as it is."""
    if size is None:
        return batch
    images, *others = batch
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True), *others
