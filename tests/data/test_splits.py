"""What is held out is a part of every class, drawn by the seed alone; statistics are those of the pictures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.samples import pixels

from diffmoe.config import UserError
from diffmoe.data.captions import CaptionSplit
from diffmoe.data.splits import Split, channel_statistics, hold_out


@given(
    labels=st.lists(st.integers(0, 3), min_size=8, max_size=60),
    fraction=st.floats(0.01, 0.95),
    seed=st.integers(0, 5),
)
def test_held_out_part_and_rest_are_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    labels += [0, 0, 1, 1, 2, 2, 3, 3]  # no class too small
    numbers = torch.arange(len(labels))
    split = Split(numbers.view(-1, 1, 1, 1), torch.tensor(labels))
    rest, held = hold_out(split, fraction, seed, "abcd")
    assert sorted(pixels(rest).flatten().tolist() + pixels(held).flatten().tolist()) == numbers.tolist()
    assert torch.equal(split.labels[pixels(held).flatten()], held.labels)
    for label in range(4):
        size, taken = labels.count(label), int((held.labels == label).sum())
        assert 1 <= taken <= size - 1
        assert abs(taken - size * fraction) <= 1


@given(count=st.integers(2, 30), fraction=st.floats(0.01, 0.95), seed=st.integers(0, 5))
def test_captioned_pictures_are_held_out_with_all_their_captions(count: int, fraction: float, seed: int) -> None:
    numbers = torch.arange(count)
    split = CaptionSplit(numbers.view(-1, 1, 1, 1), tuple((f"{n} a", f"{n} b") for n in range(count)))
    rest, held = hold_out(split, fraction, seed, ())
    assert abs(len(held) - count * fraction) <= 1
    assert len(held) >= 1
    assert len(rest) >= 1
    for part in (rest, held):
        shown = pixels(part).flatten().tolist()
        assert shown == sorted(shown)
        assert part.captions == tuple((f"{n} a", f"{n} b") for n in shown)
    assert sorted(pixels(rest).flatten().tolist() + pixels(held).flatten().tolist()) == numbers.tolist()


def test_what_is_too_small_to_split_is_named() -> None:
    pictures = torch.zeros(3, 1, 2, 2)
    with pytest.raises(UserError, match=r"^class 'b' has only 1 picture to train on: it must have 2 or more"):
        hold_out(Split(pictures, torch.tensor([0, 0, 1])), 0.1, 0, "ab")
    with pytest.raises(UserError, match=r"^the set has only 1 picture to train on"):
        hold_out(CaptionSplit(pictures[:1], (("a dog",),)), 0.1, 0, ())


def test_statistics_are_those_of_the_training_pictures() -> None:
    images = torch.randint(0, 256, (1203, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 2] = 7  # of one colour: its deviation must not be 0
    mean, std = channel_statistics(images, seed=0)
    scaled = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), scaled.mean((0, 2, 3)), atol=1e-6, rtol=0)
    expected = scaled.var((0, 2, 3), correction=0).sqrt()
    torch.testing.assert_close(torch.tensor(std[:2]).double(), expected[:2], atol=1e-6, rtol=0)
    assert std[2] == pytest.approx(1 / 255)


def test_pictures_and_labels_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="3 pictures but 2 labels"):
        Split(torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
