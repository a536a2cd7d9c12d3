"""A crop is a window of the reflected picture, a flip is its mirror, an erasure is one rectangle, a mix is of two."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn.functional import pad

from diffmoe.config import DataConfig
from diffmoe.data.augmentation import crop_and_flip, cutout, erase, is_mirrored, mix


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


def test_alternate_flip_shows_both_views_of_every_picture_in_any_two_epochs() -> None:
    rows = torch.arange(5000)
    for epoch in range(3):
        assert torch.equal(is_mirrored(rows, epoch), ~is_mirrored(rows, epoch + 1))
        assert torch.equal(is_mirrored(rows, epoch), is_mirrored(rows, epoch + 2))
    first = is_mirrored(rows, 0)
    assert 2300 < first.sum() < 2700  # half of them ...
    for step in (2, 10, 100):  # ... and of those that stand at regular places, as the pictures of one class may
        assert 0.4 < first[::step].float().mean() < 0.6
    assert torch.equal(is_mirrored(rows[7:30], 0), first[7:30])  # by its row alone


def test_alternate_flip_takes_the_place_of_flip() -> None:
    images, turn = pictures(40), torch.arange(40) % 3 == 0
    for flip in (False, True):
        out = crop_and_flip(images, DataConfig(flip=flip, alternate_flip=True), Generator().manual_seed(0), turn)
        expected = torch.where(turn[:, None, None, None], images.flip(-1), images)
        assert torch.equal(out, expected)


@given(size=st.integers(1, 6))
def test_cutout_blanks_one_square_of_every_picture_wholly_inside(size: int) -> None:
    images = torch.ones(200, 2, 7, 6)
    out = cutout(images, size, Generator().manual_seed(0))
    assert torch.equal(out[:, 0], out[:, 1])
    blank = out[:, 0] == 0
    rows, columns = blank.any(2), blank.any(1)
    assert torch.equal(blank, rows[:, :, None] & columns[:, None, :])
    assert (rows.sum(1) == size).all()
    assert (columns.sum(1) == size).all()
    for line, length in ((rows, 7), (columns, 6)):
        assert len({tuple(places) for places in line.tolist()}) == length - size + 1  # of one piece, everywhere


def test_mixup_averages_two_pictures_by_their_shares() -> None:
    images = torch.randn(500, 2, 5, 4, generator=Generator().manual_seed(1))
    out, other, share = mix(images, DataConfig(mixup=0.8), Generator().manual_seed(0))
    assert sorted(other.tolist()) == list(range(500))
    own = share[:, None, None, None]
    torch.testing.assert_close(out, own * images + (1 - own) * images[other])
    assert ((share >= 0.5) & (share <= 1)).all()
    # The larger of x and 1 - x, x of Beta(a, a), is as far from 1/2 as x, whose variance is 1 / (4 (2a + 1)).
    assert (share - 0.5).square().mean().item() == pytest.approx(1 / (4 * 2.6), rel=0.1)


def test_cutmix_puts_a_rectangle_of_another_picture_in_its_place() -> None:
    count, height, width = 500, 12, 8
    images = torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(count, 2, height, width)
    out, other, share = mix(images, DataConfig(cutmix=1.0), Generator().manual_seed(0))
    from_other = out[:, 0] != images[:, 0]
    assert torch.equal(out, torch.where(from_other[:, None], images[other], images))
    changed = other != torch.arange(count)
    torch.testing.assert_close(1 - from_other.float().mean((1, 2))[changed], share[changed])
    assert ((share >= 0.5) & (share <= 1)).all()
    assert share.std() > 0.1
    rows, columns = from_other.any(2), from_other.any(1)
    assert torch.equal(from_other, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):
        assert ((line[:, 1:] & ~line[:, :-1]).sum(1) + line[:, 0] <= 1).all()


def test_mixup_and_cutmix_together_is_either_by_chance() -> None:
    images = torch.arange(1.0, 1001).view(-1, 1, 1, 1).expand(1000, 1, 8, 8)
    out, other, _ = mix(images, DataConfig(mixup=1.0, cutmix=1.0), Generator().manual_seed(0))
    is_cut = ((out == images) | (out == images[other])).flatten(1).all(1)
    assert 400 < is_cut.sum() < 620  # some averages are so small a part that they round away


@pytest.mark.parametrize("augmentation", [DataConfig(mixup=0.2), DataConfig(cutmix=0.2)])
def test_a_picture_alone_is_mixed_with_itself(augmentation: DataConfig) -> None:
    images = torch.randn(1, 3, 6, 6)
    out, other, _ = mix(images, augmentation, Generator().manual_seed(0))
    torch.testing.assert_close(out, images)
    assert other.tolist() == [0]
