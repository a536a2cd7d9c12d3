"""Pictures that strangers hand in: checked by their headers before they are decoded."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data.pictures import decode_picture
from diffmoe.visualization.language import say

MAX_PIXELS = 50_000_000
"""A picture must have fewer: decoded, so many are 150 MB."""
MAX_BYTES = 20_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Of those that PIL knows. Others start programs (EPS) or are no pictures of a camera or a screen."""


def read_upload(path: str | None, img_size: int, in_channels: int) -> Tensor:
    """The picture in a file as uint8 (in_channels, img_size, img_size).

    Raises `UserError` where there is none, or it is too large, has too many pixels, is damaged or no picture.
    """
    if path is None:
        raise UserError(say("There is no picture yet: drop one or choose a file."))
    name = Path(path).name
    return decode_picture(_checked(Path(path), name), name, img_size, in_channels)


def thumbnail(path: Path, side: int = 320) -> Image.Image:
    """A picture of the gallery as it is shown: upright, in colour, at most `side` pixels long."""
    with Image.open(path) as image:
        image.draft("RGB", (side, side))
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((side, side))
    return upright


def _checked(path: Path, name: str) -> bytes:
    """The content of a file whose header says that it can be decoded. Raises `UserError` beginning with `name`."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(say("{name} is too large: at most {limit} MB are read.", name=name, limit=MAX_BYTES // 10**6))
    encoded = path.read_bytes()
    Image.init()
    try:
        with Image.open(io.BytesIO(encoded), formats=[kind for kind in FORMATS if kind in Image.OPEN]) as image:
            is_small = image.width * image.height < MAX_PIXELS
    except Image.UnidentifiedImageError as error:
        raise UserError(say("{name} is not a picture: it must be a JPEG, PNG, WebP, … file.", name=name)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # PIL's own limit, which is higher
        is_small = False
    if not is_small:
        limit = MAX_PIXELS // 10**6
        raise UserError(
            say("{name} has too many pixels: it must have under {limit} megapixels.", name=name, limit=limit)
        )
    return encoded
