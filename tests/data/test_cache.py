"""Decoded once: the second start reads the cache, bit-equal; a damaged or unwritable one costs a line, not the run."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.data.samples import load, pixels

from diffmoe.data import cache
from diffmoe.data.pictures import PictureSpec


def test_second_load_is_bit_equal_and_decodes_nothing(picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(picture_folder)
    monkeypatch.setattr(PictureSpec, "decode", lambda *_: pytest.fail("decoded again"))
    second = load(picture_folder)
    assert (first.class_names, first.picture) == (second.class_names, second.picture)
    for name in ("train", "validation", "test"):
        assert torch.equal(pixels(getattr(first, name)), pixels(getattr(second, name)))
        assert torch.equal(getattr(first, name).labels, getattr(second, name).labels)


def test_each_size_and_colour_is_cached_by_itself(picture_folder: Path) -> None:
    for size, channels in ((8, 3), (6, 3), (8, 1), (8, 3)):
        assert load(picture_folder, size, channels).train.images.shape[1:] == (channels, size, size)
    assert len(list(cache.cache_dir().iterdir())) == 3


def test_a_changed_picture_is_decoded_again(picture_folder: Path) -> None:
    before = load(picture_folder)
    target = picture_folder / "test/bird/00.png"
    target.write_bytes((picture_folder / "test/dog/00.png").read_bytes())
    after = load(picture_folder)
    assert not torch.equal(pixels(before.test)[0], pixels(after.test)[0])
    assert torch.equal(pixels(after.test)[0], pixels(after.test)[8])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_cache_is_made_again(
    picture_folder: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(picture_folder)
    (path,) = cache.cache_dir().iterdir()  # one file, and no partial one beside it
    whole = path.rename(tmp_path / "whole").read_bytes()  # moved: the first load may have it mapped
    path.write_bytes({"truncated": whole[:-5], "garbage": b"x" * 5000, "empty": b""}[damage])
    second = load(picture_folder)
    assert torch.equal(pixels(first.train), pixels(second.train))
    (tensors, texts), (wanted, wanted_texts) = (
        cache.read_cache(file) or ({}, {}) for file in (path, tmp_path / "whole")
    )
    assert texts == wanted_texts != {}
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert len(caplog.records) == 1


def test_an_unwritable_cache_is_one_warning(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DIFFMOE_CACHE", str(tmp_path / "file/cache"))
    with caplog.at_level(logging.WARNING):
        assert len(load(picture_folder).test) == 12
    (record,) = caplog.records
    assert "DIFFMOE_CACHE" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_user_without_a_home_has_no_cache_and_is_told_so(
    picture_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("DIFFMOE_CACHE")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with caplog.at_level(logging.WARNING):
        assert cache.read_cache(cache.cache_path("key", PictureSpec(8, 3))) is None
        cache.write_cache(cache.cache_path("key", PictureSpec(8, 3)), {"x": torch.zeros(1)}, {})
    (record,) = caplog.records
    assert "set DIFFMOE_CACHE" in record.getMessage()


def flipped(whole: bytes, number: int) -> bytes:
    """With one bit that is another."""
    place = int(torch.randint(8 * len(whole), (1,), generator=torch.Generator().manual_seed(number)))
    changed = bytearray(whole)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.safetensors"
    tensors = {"train.images": torch.arange(200, dtype=torch.uint8).view(2, 1, 10, 10), "train.labels": torch.arange(2)}
    texts = {"class_names": '["cat", "dog"]', "captions": "{}"}
    cache.write_cache(path, tensors, texts)
    whole = path.read_bytes()
    for number in range(200):
        path.unlink()  # the last one may still be mapped
        path.write_bytes(flipped(whole, number))
        if (found := cache.read_cache(path)) is not None:
            assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
            assert all(found[1][name] == texts[name] for name in texts)
    assert len(caplog.records) >= 190
    assert all(str(path) in record.getMessage() for record in caplog.records)


def test_a_cache_of_an_earlier_version_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    tensors, texts = {"train.images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, {"captions": "{}"}
    save_file(tensors, tmp_path / "old", texts)
    found = cache.read_cache(tmp_path / "old")
    assert found is not None
    assert torch.equal(found[0]["train.images"], tensors["train.images"])
    assert found[1] == texts
