"""Test-time augmentation: what a model says of a picture is averaged over views of it.

Shapes: B pictures, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from diffmoe.config import UserError

SHIFTS = {"none": (0,), "flip": (0,), "flip_shift": (0, -1, 1)}
"""Pixels that the views are shifted by, both ways at once."""


def views(images: Tensor, tta: str) -> Iterator[Tensor]:
    """The views of pictures, float (B, C, H, W): as they are, mirrored, shifted by a pixel with the edges reflected.

    'flip' has 2; 'flip_shift' (Jordan 2024) has 6, each of three windows of the reflected picture and its mirror.
    Raises `UserError` for a name that is none.
    """
    if tta not in SHIFTS:
        raise UserError(f"tta is {tta!r}: it must be one of {', '.join(SHIFTS)}")
    for shift in SHIFTS[tta]:
        shifted = _shifted(images, shift) if shift else images
        yield shifted
        if tta != "none":
            yield shifted.flip(-1)


def _shifted(images: Tensor, by: int) -> Tensor:
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return padded[..., 1 - by : 1 - by + height, 1 - by : 1 - by + width]
