"""A crop is a window of the reflected picture, a flip is its mirror, an erasure is one rectangle."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn.functional import pad

from diffmoe.config import DataConfig
from diffmoe.data.augmentation import crop_and_flip, erase


def pictures(count: int, channels: int = 3, height: int = 7, width: int = 6) -> Tensor:
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=Generator().manual_seed(0))


def windows(picture: Tensor, padding: int) -> list[list[int]]:
    """Every window of `picture` (C, H, W) after reflecting its edges, by an implementation of its own."""
    _, H, W = picture.shape
    padded = pad(picture[None].float(), (padding,) * 4, mode="reflect")[0].to(torch.uint8)
    places = range(2 * padding + 1)
    return [padded[:, y : y + H, x : x + W].flatten().tolist() for y in places for x in places]


@given(padding=st.integers(0, 5), channels=st.sampled_from([1, 3]), seed=st.integers(0, 100))
def test_every_crop_is_a_window_of_its_reflected_picture(padding: int, channels: int, seed: int) -> None:
    images = pictures(4, channels)
    cropped = crop_and_flip(images, DataConfig(crop_padding=padding), Generator().manual_seed(seed))
    assert cropped.shape == images.shape
    assert cropped.dtype == torch.uint8
    for image, crop in zip(images, cropped, strict=True):
        assert crop.flatten().tolist() in windows(image, padding)


def test_crops_take_every_window_about_equally_often() -> None:
    count, padding = 9000, 1
    images = pictures(1).expand(count, -1, -1, -1)
    cropped = crop_and_flip(images, DataConfig(crop_padding=padding), Generator().manual_seed(0))
    found, times = torch.unique(cropped.flatten(1), dim=0, return_counts=True)
    assert sorted(found.tolist()) == sorted(windows(images[0], padding))
    assert ((times - 1000).abs() < 5 * 1000**0.5).all()  # five standard deviations of a share of 1/9


def test_half_of_the_pictures_are_mirrored_and_the_others_left() -> None:
    images = pictures(1000)
    out = crop_and_flip(images, DataConfig(flip=True), Generator().manual_seed(0))
    kept = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 420 < mirrored.sum() < 580  # five standard deviations, sqrt(1000) / 2 each


def test_crop_and_flip_together_is_the_mirror_of_a_window() -> None:
    images = pictures(30)
    out = crop_and_flip(images, DataConfig(crop_padding=2, flip=True), Generator().manual_seed(0))
    for image, picture in zip(images, out, strict=True):
        allowed = windows(image, 2)
        assert picture.flatten().tolist() in allowed or picture.flip(-1).flatten().tolist() in allowed


@given(probability=st.sampled_from([0.0, 0.3, 1.0]), height=st.integers(1, 12), width=st.integers(1, 12))
def test_erasing_blanks_one_rectangle_of_some_pictures(probability: float, height: int, width: int) -> None:
    images = torch.ones(200, 2, height, width)
    out = erase(images, probability, Generator().manual_seed(0))
    assert (images == 1).all(), "the input was changed"
    assert ((out == 0) | (out == 1)).all()
    assert torch.equal(out[:, 0], out[:, 1])
    blank = out[:, 0] == 0
    rows, columns = blank.any(2), blank.any(1)
    assert torch.equal(blank, rows[:, :, None] & columns[:, None, :])  # a product of rows and columns, and ...
    for line in (rows, columns):
        starts = (line[:, 1:] & ~line[:, :-1]).sum(1) + line[:, 0]
        assert (starts <= 1).all()  # ... each of one piece
    chosen = blank.flatten(1).any(1)
    assert abs(int(chosen.sum()) - 200 * probability) <= 5 * (200 * 0.25) ** 0.5 * (0 < probability < 1)


def test_erased_area_is_between_a_fiftieth_and_a_third() -> None:
    out = erase(torch.ones(500, 1, 32, 32), 1.0, Generator().manual_seed(0))
    share = (out == 0).float().mean((1, 2, 3))
    assert share.min() > 0.015
    assert share.max() < 0.36
    assert share.max() > 0.28
