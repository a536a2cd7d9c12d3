"""The picture to click on: as the model sees it, enlarged, and which patch is where.

Patches are counted from 1 in reading order; 0 is none of them.
"""

from __future__ import annotations

from PIL import Image, ImageDraw
from torch import Tensor

from diffmoe.config import ModelConfig, UserError
from diffmoe.visualization.colors import VERMILLION
from diffmoe.visualization.language import say

SIDE = 448
"""Dots of the enlarged picture, about."""


def enlarged(pixels: Tensor, config: ModelConfig, patch: int = 0) -> Image.Image:
    """A picture of the model's size, uint8 (C, H, W), with a frame around a patch."""
    scale = _scale(config)
    pixels_HWC = pixels.permute(1, 2, 0).numpy()
    seen = Image.fromarray(pixels_HWC.squeeze(-1) if len(pixels) == 1 else pixels_HWC).convert("RGB")
    seen = seen.resize((config.img_size * scale, config.img_size * scale), Image.Resampling.NEAREST)
    if patch > 0:
        row, column = divmod(patch - 1, config.img_size // config.patch_size)
        side = config.patch_size * scale
        corners = (column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1)
        ImageDraw.Draw(seen).rectangle(corners, outline=VERMILLION, width=max(3, side // 12))
    return seen


def patch_at(config: ModelConfig, x: float, y: float) -> int:
    """The patch at a place of the `enlarged` picture, in its dots from the left and from the top.

    Raises `UserError` where that is beside the picture.
    """
    whole, side = config.img_size * _scale(config), config.patch_size * _scale(config)
    if not (0 <= x < whole and 0 <= y < whole):
        raise not_on_picture()
    return int(y // side) * (config.img_size // config.patch_size) + int(x // side) + 1


def not_on_picture() -> UserError:
    """What to raise for a click that hits no patch."""
    return UserError(say("This is beside the picture: click on one of its patches."))


def _scale(config: ModelConfig) -> int:
    return max(1, SIDE // config.img_size)
