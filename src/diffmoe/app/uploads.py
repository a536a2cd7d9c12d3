"""Pictures that strangers hand in: no other file is opened, and headers are checked before anything is decoded."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data.pictures import PictureSpec
from diffmoe.visualization.language import say

MAX_PIXELS = 50_000_000
"""A picture must have fewer: decoded, so many are 150 MB."""
MAX_BYTES = 20_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Of those that PIL knows. Others start programs (EPS) or are no pictures of a camera or a screen."""


def read_upload(path: str | None, folder: Path, spec: PictureSpec) -> Tensor:
    """The picture in a file as uint8 (C, size, size).

    Args:
        path: what a stranger says; only a regular file in `folder` is opened, links followed.
        folder: where uploads lie, resolved.
        spec: what a picture is to the model.

    Raises:
        UserError: where there is none, or it is no upload, too large, has too many pixels, is damaged or no picture.
            Whatever is no upload is refused in the same words: they do not tell what this machine has.
    """
    if path is None:
        raise UserError(say("There is no picture yet: drop one or choose a file."))
    encoded, name = _read(path, folder), os.path.basename(path)
    if len(encoded) > MAX_BYTES:
        raise UserError(say("{name} is too large: at most {limit} MB are read.", name=name, limit=MAX_BYTES // 10**6))
    with _opened(encoded, name) as image:
        try:
            image.draft(None, (2 * spec.size, 2 * spec.size))  # as `PictureSpec.decode` does
            return spec.fit(image)
        except Exception as error:  # on damaged files PIL raises a dozen types, SyntaxError among them
            raise UserError(say("{name} cannot be decoded: it must be a whole picture.", name=name)) from error


def no_upload() -> UserError:
    """What to raise for a picture that nobody uploaded."""
    return UserError(say("This picture was not uploaded here: drop one or choose a file."))


def thumbnail(path: Path, side: int = 320) -> Image.Image:
    """A picture of the gallery as it is shown: upright, in colour, at most `side` pixels long."""
    with Image.open(path) as image:
        image.draft("RGB", (side, side))
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((side, side))
    return upright


def _read(path: str, folder: Path) -> bytes:
    """The content of a file, no more than the first `MAX_BYTES` + 1 bytes."""
    try:
        descriptor = _open(path, folder)
    except (OSError, ValueError) as error:  # ValueError: a null byte, or half a character
        raise no_upload() from error
    with open(descriptor, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _open(path: str, folder: Path) -> int:
    """The descriptor of a regular file in `folder`. Raises OSError or ValueError where `path` is none."""
    # First by name alone: not even the time that a refusal takes depends on files outside the folder.
    Path(os.path.abspath(path)).relative_to(folder)
    resolved = os.path.realpath(path, strict=True)
    Path(resolved).relative_to(folder)
    # What may have taken the file's place since is not followed (a link) or waited for (a pipe).
    descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{resolved} is no regular file")
    return descriptor


def _opened(encoded: bytes, name: str) -> Image.Image:
    """A picture whose header says that it can be decoded. Raises `UserError` beginning with `name`."""
    Image.init()
    try:
        image = Image.open(io.BytesIO(encoded), formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # PIL's own limit, which is higher
        raise _too_many_pixels(name) from error
    except Exception as error:  # where only the beginning is good PIL raises another type than where nothing is
        raise UserError(say("{name} is not a picture: it must be a JPEG, PNG, WebP, … file.", name=name)) from error
    if image.width * image.height >= MAX_PIXELS:
        raise _too_many_pixels(name)
    return image


def _too_many_pixels(name: str) -> UserError:
    limit = MAX_PIXELS // 10**6
    return UserError(say("{name} has too many pixels: it must have under {limit} megapixels.", name=name, limit=limit))
