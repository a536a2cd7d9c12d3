"""Digits, names, splits, statistics and the cache."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffmoe.config import DataConfig, UserError
from diffmoe.data import ImageDataset, Split, cache, check_dataset, load_dataset, pictures
from diffmoe.data.splits import channel_statistics, hold_out


def test_importing_the_package_is_light() -> None:
    heavy = ("datasets", "pyarrow", "sklearn", "open_clip", "torchvision", "tokenizers", "safetensors")
    code = f"import sys, diffmoe.data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def load_digits(img_size: int = 8, in_channels: int = 1, split_seed: int = 0) -> ImageDataset:
    return load_dataset(DataConfig(split_seed=split_seed), img_size=img_size, in_channels=in_channels)


def pixels(split: Split) -> Tensor:
    assert isinstance(split.images, Tensor)
    return split.images


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits as sklearn_digits

    data = load_digits()
    expected = torch.from_numpy(sklearn_digits(return_X_y=True)[0])
    everything = torch.cat([pixels(split) for split in (data.train, data.validation, data.test)])
    assert everything.shape == (1797, 1, 8, 8)
    assert everything.max() == 255
    back = (everything[:, 0].double() * 16 / 255).round()
    assert sorted(back.flatten(1).tolist()) == sorted(expected.tolist())


def test_digits_of_another_size_and_in_colour() -> None:
    data = load_digits(img_size=12, in_channels=3)
    assert pixels(data.train).shape[1:] == (3, 12, 12)
    assert (pixels(data.train)[:, :1] == pixels(data.train)).all()
    assert len(data.mean) == len(data.std) == 3


def test_splits_are_stratified_and_depend_on_split_seed_alone() -> None:
    data, again, other = load_digits(), load_digits(), load_digits(split_seed=1)
    for split in (data.train, data.validation, data.test):
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert (shares - 0.1).abs().max() < 0.012
    assert torch.equal(pixels(data.test), pixels(again.test))
    assert not torch.equal(pixels(data.test)[:100], pixels(other.test)[:100])


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar1O", r"dataset is 'cifar1O' \(did you mean 'cifar10'\?\): it must be one of digits, "),
        ("./nowhere", "a folder or a captions table that exists, or a hub name such as owner/name"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_dataset(DataConfig(dataset=name))


def test_second_load_is_bit_equal_and_decodes_nothing(picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(dataset=str(picture_folder))
    first = load_dataset(config, img_size=8, in_channels=3)
    monkeypatch.setattr(pictures, "decode_picture", lambda *_: pytest.fail("decoded again"))
    second = load_dataset(config, img_size=8, in_channels=3)
    assert (first.class_names, first.mean, first.std) == (second.class_names, second.mean, second.std)
    for name in ("train", "validation", "test"):
        assert torch.equal(pixels(getattr(first, name)), pixels(getattr(second, name)))
        assert torch.equal(getattr(first, name).labels, getattr(second, name).labels)


def test_a_changed_picture_is_decoded_again(picture_folder: Path) -> None:
    config = DataConfig(dataset=str(picture_folder))
    before = load_dataset(config, img_size=8, in_channels=3)
    target = picture_folder / "test/bird/00.png"
    target.write_bytes((picture_folder / "test/dog/00.png").read_bytes())
    after = load_dataset(config, img_size=8, in_channels=3)
    assert not torch.equal(pixels(before.test)[0], pixels(after.test)[0])
    assert torch.equal(pixels(after.test)[0], pixels(after.test)[8])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_cache_is_made_again(picture_folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(dataset=str(picture_folder))
    first = load_dataset(config, img_size=8, in_channels=3)
    (path,) = cache.cache_dir().iterdir()  # one file, and no partial one beside it
    whole = path.read_bytes()
    path.unlink()  # the first load may have the old file mapped
    path.write_bytes({"truncated": whole[:-5], "garbage": b"x" * 5000, "empty": b""}[damage])
    second = load_dataset(config, img_size=8, in_channels=3)
    assert torch.equal(pixels(first.train), pixels(second.train))
    assert path.read_bytes() == whole
    assert len(caplog.records) == 1


def test_an_unwritable_cache_is_one_warning(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DIFFMOE_CACHE", str(tmp_path / "file/cache"))
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset(DataConfig(dataset=str(picture_folder)), img_size=8, in_channels=3).test) == 12
    (record,) = caplog.records
    assert "DIFFMOE_CACHE" in record.getMessage()
    assert "\n" not in record.getMessage()
