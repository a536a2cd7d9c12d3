"""Small sets on disk, and what is read from them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffmoe.config import DataConfig
from diffmoe.data.captions import CaptionSplit
from diffmoe.data.loading import Dataset, load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.sources import check_dataset
from diffmoe.data.splits import Split


def png(value: int, size: int = 6) -> bytes:
    """A picture of one grey, by which it is known again."""
    file = io.BytesIO()
    Image.fromarray(np.full((size, size), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def pictures(folder: Path, count: int = 10) -> list[str]:
    """`count` files of different colours in a new folder: their names."""
    folder.mkdir(parents=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (number * 20, 90, 30)).save(folder / name)
    return names


def labelled(folder: Path, *classes: str) -> Path:
    """A set in class folders, 10 pictures a class and no split but train."""
    for name in classes:
        pictures(folder / "train" / name)
    return folder


def captioned(folder: Path, file: str = "captions.csv", word: str = "w") -> Path:
    """A captions table of the 10 pictures in `folder`, which are made where there are none."""
    names = [path.name for path in folder.glob("*.png")] or pictures(folder)
    (folder / file).write_text("\n".join(["image,caption", *(f"{name},{word} {name}" for name in names)]))
    return folder


def load(place: Path | str, size: int = 8, channels: int = 3, *, progress: bool = False, **options: Any) -> Dataset:
    """Checked first, as every command does; options are those of `DataConfig`."""
    config = DataConfig(dataset=str(place), **options)
    check_dataset(config)
    return load_dataset(config, PictureSpec(size, channels), progress)


def pixels(split: Split | CaptionSplit) -> Tensor:
    """All pictures of a split, uint8 (N, C, H, W), whether they are in memory or not."""
    return split.images[torch.arange(len(split))]


def greys(split: Split | CaptionSplit) -> list[int]:
    """The one grey level of each picture."""
    return pixels(split)[:, 0, 0, 0].tolist()


def pairs(split: CaptionSplit) -> dict[int, tuple[str, ...]]:
    """Grey level -> captions."""
    return dict(zip(greys(split), split.captions, strict=True))
