"""Encoded pictures become uint8 tensors of one size, all at once or as they are asked for.

Shapes: B pictures of a batch, N of a split, C channels (1 grey, 3 colour), H height, W width.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffmoe.config import UserError, expanded

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".avif"),
    *(".gif", ".bmp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm"),
)
"""Files with these endings are pictures and must decode; all others in a class folder are ignored."""
HEIC_SUFFIXES = (".heic", ".heif")
with contextlib.suppress(ImportError):  # the extra `heic`
    from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

    register_heif_opener()
    PICTURE_SUFFIXES = (*PICTURE_SUFFIXES, *HEIC_SUFFIXES)
UNREAD_SUFFIXES = tuple(
    suffix
    for suffix in (
        *(*HEIC_SUFFIXES, ".jxl", ".svg", ".psd", ".xcf", ".tga", ".ico", ".eps", ".exr", ".hdr", ".dds", ".icns"),
        *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".dcm"),
    )
    if suffix not in PICTURE_SUFFIXES
)
"""Endings of what people take for pictures: counted and said."""

# Texts and colour profiles of over 1 MB are not the picture, but PIL gives it up for them. Its limit for all texts of
# a file, 64 MB, does for each: what unpacks to more is meant to do harm.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# What libtiff thinks of a damaged file it would print beside the one line that refuses it.
for _library in Path(Image.__file__).parents[1].glob("pillow.libs/libtiff-*"):
    for _handler in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        getattr(ctypes.CDLL(str(_library)), _handler)(None)

_CHUNK_BYTES = 2**21
"""Decoded bytes that a worker hands over at once."""


EVALUATION_VALUES = 500 * 3 * 64 * 64
"""Pixels times channels that are looked at at a time in evaluation; no result depends on it."""


@dataclass(frozen=True)
class PictureSpec:
    """What a picture is to a model. Raises `UserError` for channels that no picture has."""

    size: int
    """Height and width in pixels."""
    channels: int
    """1 grey, 3 colour."""
    mean: tuple[float, ...] = ()
    """Of each channel over the training pictures, in [0, 1]; empty where they are not known yet."""
    std: tuple[float, ...] = ()
    """Likewise, the standard deviation."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"in_channels is {self.channels!r}: it must be 1 (grey) or 3 (colour) for pictures")

    @property
    def evaluation_batch(self) -> int:
        """Pictures (or texts) at a time in evaluation: 500, and fewer of large ones."""
        return max(1, min(500, EVALUATION_VALUES // (self.channels * self.size**2)))

    def read(self, picture: str | Path | Image.Image) -> Tensor:
        """A picture of any mode and size, at a path (`~` is the user's home) or PIL's, as uint8 (C, size, size).

        Raises `UserError` naming the path where it is missing, no picture, corrupt or truncated.
        """
        if isinstance(picture, Image.Image):
            return self.fit(picture.copy())
        path = expanded(str(picture))
        return self.decode(Path(path), path)

    def decode(self, picture: bytes | Path, where: str) -> Tensor:
        """An encoded picture as uint8 (C, size, size). Raises `UserError` naming `where` where that fails."""
        try:
            # Through bytes, not the path: PIL would leave the file of a damaged picture open.
            encoded = _read_file(picture) if isinstance(picture, Path) else picture
            with Image.open(io.BytesIO(encoded)) as image:
                # JPEG can decode straight to a half, a quarter or an eighth: no photograph is decoded at 20 times the
                # size.
                image.draft(None, (2 * self.size, 2 * self.size))
                return self.fit(image)
        except Image.UnidentifiedImageError as error:
            raise UserError(f"{where} is not a picture: it must be a JPEG, PNG, WebP, ... file") from error
        except Image.DecompressionBombError as error:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # PIL warns from half of it on
            raise UserError(f"{where} is too large: it must have {limit:,} pixels or fewer, scale it down") from error
        except Exception as error:  # on damaged files PIL raises a dozen types, SyntaxError among them
            if isinstance(error, OSError) and error.strerror:
                raise UserError(f"{where}: {error.strerror}: it must be a picture that can be read") from error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{where} cannot be decoded ({reason}): replace it by a whole picture or remove it"
            ) from error

    def fit(self, image: Image.Image) -> Tensor:
        """A PIL picture of any mode and size as uint8 (C, size, size): upright, on white, squashed to a square."""
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _to_8_bit(image)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)  # PIL's is antialiased
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1)

    def normalize(self, images: Tensor) -> Tensor:
        """Pictures, uint8 (..., C, H, W) -> float32 minus `mean` over `std`, those of each channel in [0, 1]."""
        mean_C11, std_C11 = self._statistics(images.device)
        return images.float().sub_(mean_C11 * 255).div_(std_C11 * 255)

    def restore(self, images: Tensor) -> Tensor:
        """Back again: normalised pictures (..., C, H, W) -> uint8, on the CPU."""
        mean_C11, std_C11 = self._statistics(torch.device("cpu"))
        return (255 * (images.cpu() * std_C11 + mean_C11)).round().clamp(0, 255).byte()

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std


class Pictures(Protocol):
    """Pictures of one split, still encoded."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[bytes | Path]:
        """The encoded pictures at `rows`."""
        ...

    def where(self, row: int) -> str:
        """How a message names the picture at `row`: its path, or its file and row."""
        ...


@dataclass(frozen=True)
class LazyImages:
    """Pictures decoded when they are indexed, for sets over `max_memory_gb`. Can be pickled for worker processes.

    `lazy[i]` is uint8 (C, H, W) and `lazy[indices]` uint8 (B, C, H, W), as with the tensor of a set in memory.
    Raises `UserError` naming the picture where one cannot be decoded.
    """

    pictures: Pictures
    rows: Tensor  # int64 (N,), rows of `pictures`
    spec: PictureSpec

    @classmethod
    def of(cls, pictures: Pictures, spec: PictureSpec) -> LazyImages:
        """All of `pictures`."""
        return cls(pictures, torch.arange(len(pictures)), spec)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (len(self), self.spec.channels, self.spec.size, self.spec.size)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tensor:
        rows = self.rows[index]
        encoded = self.pictures.read(rows.reshape(-1).tolist())
        images = torch.empty(len(encoded), *self.shape[1:], dtype=torch.uint8)
        for image, row, picture in zip(images, rows.reshape(-1).tolist(), encoded, strict=True):
            image.copy_(self.spec.decode(picture, self.pictures.where(row)))
        return images.view(*rows.shape, *self.shape[1:])

    def subset(self, indices: Tensor) -> LazyImages:
        """The pictures at `indices`, int64 (M,)."""
        return dataclasses.replace(self, rows=self.rows[indices])

    def stream(self, batches: Sequence[Tensor], num_workers: int, pin_memory: bool = False) -> Iterator[Tensor]:
        """`self[indices]` for each `indices` of `batches`, in order, decoded ahead by worker processes.

        Processes, not threads: for small pictures most of the time is Python's (PIL alone, CIFAR-10, pictures/s on 2
        cores: 14,000 in 2 processes, 7,700 in 2 threads, 8,300 without either). What they are given and hand over are
        lists and arrays, through pipes: tensors go through shared memory, of which a default container has 64 MB, and
        where a batch finds no room there the loader waits for it for ever.
        """
        loader = DataLoader(
            _DecodedOrError(self),
            batch_size=None,
            sampler=(batch.tolist() for batch in batches),
            collate_fn=_unchanged,  # the default makes tensors of arrays
            num_workers=min(num_workers, available_cores()),
            generator=torch.Generator(),  # or starting the workers would draw from the global one
        )
        for decoded in loader:
            if isinstance(decoded, UserError):
                raise decoded
            images = torch.from_numpy(decoded)
            yield images.pin_memory() if pin_memory else images

    def unreadable(self, progress: bool) -> list[tuple[str, str]]:
        """Of each picture that cannot be decoded where it is, and why; with a progress bar as `load`."""
        from tqdm import tqdm

        found = []
        for row in tqdm(
            range(len(self)), "checking", unit=" pictures", delay=2, leave=False, disable=None if progress else True
        ):
            try:
                self[row]
            except UserError as error:
                where = self.pictures.where(int(self.rows[row]))
                found.append((where, str(error).removeprefix(where).lstrip(": ")))
        return found

    def load(self, progress: bool) -> Tensor:
        """All pictures, uint8 (N, C, H, W), with a progress bar on stderr where it takes longer than 2 s."""
        from tqdm import tqdm

        images = torch.empty(self.shape, dtype=torch.uint8)
        chunk = max(1, _CHUNK_BYTES // (self.spec.channels * self.spec.size**2))
        workers = min(8, available_cores()) if len(self) >= 4 * chunk else 0
        start = 0
        with tqdm(
            total=len(self), desc="decoding", unit=" pictures", delay=2, leave=False, disable=None if progress else True
        ) as bar:
            for decoded in self.stream(torch.arange(len(self)).split(chunk), workers):
                images[start : start + len(decoded)] = decoded
                start += len(decoded)
                bar.update(len(decoded))
        return images


@dataclass(frozen=True)
class _DecodedOrError(Dataset["np.ndarray | UserError"]):
    """`lazy[indices]` for a DataLoader, which would wrap an error in a traceback of many lines: it is handed over."""

    lazy: LazyImages

    def __getitem__(self, indices: list[int]) -> np.ndarray | UserError:
        try:
            return self.lazy[indices].numpy()
        except UserError as error:
            return error


def _unchanged(decoded: Any) -> Any:
    return decoded


def _read_file(path: Path) -> bytes:
    """Its bytes. Raises `OSError` where there are none, or where they may have no end: of a device, of a pipe."""
    if not (path.is_file() or path.is_dir()) and path.exists():
        raise OSError(errno.EINVAL, "Not a regular file")
    return path.read_bytes()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits or more as mode L; PIL's own conversion would clip at 255.

    Integers count as 16 bits: PIL opens 16-bit grey files as "I;16" or "I". Floats count as 0 to 1, or as
    0 to 255 where any is over 1; what is no finite number, as measurements have where nothing was seen, is black.
    """
    pixels = np.asarray(image).astype(np.float64)
    pixels[~np.isfinite(pixels)] = 0
    white = 65535.0 if image.mode != "F" else 255.0 if pixels.max() > 1 else 1.0
    return Image.fromarray(np.rint(pixels.clip(0, white) * (255 / white)).astype(np.uint8))
