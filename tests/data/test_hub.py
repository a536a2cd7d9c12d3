"""The hub, without one: what is cached needs no network, and what is not says so in one line."""

import threading
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from diffmoe.config import DataConfig, UserError
from diffmoe.data import hub, sources
from diffmoe.data.loading import load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.sources import check_dataset

CIFAR10 = DataConfig(dataset="cifar10")


def test_offline_and_not_cached() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot get uoft-cs/cifar10 from the hub .*--data_dir DIR") as caught:
        check_dataset(CIFAR10)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("~/.cache/huggingface/datasets"))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(UserError, match=r"datasets begins with ~, and this user has no home"):
        check_dataset(CIFAR10)


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: released.wait(30))
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(UserError, match="no answer in"):
        check_dataset(CIFAR10)
    released.set()
    assert hub.REQUEST_SECONDS < 10


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def ask(*_: Any, **__: Any) -> None:
        raise Missing

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    with pytest.raises(UserError, match="dataset is 'data/pets': there is no such folder"):
        check_dataset(DataConfig(dataset="data/pets"))


def test_a_download_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> None:
        raise ConnectionError("connection lost\nand a long story")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", download)
    with pytest.raises(UserError, match="connection lost") as caught:
        load_dataset(CIFAR10, PictureSpec(8, 3))
    assert "\n" not in str(caught.value)


def pets(*names: str) -> datasets.Dataset:
    """12 pictures, each second one of a dog, however `names` number them."""
    pictures = [Image.new("L", (8, 8), grey) for grey in range(12)]
    labels = [names.index(("cat", "dog")[grey % 2]) for grey in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def download(monkeypatch: pytest.MonkeyPatch, **files: Path) -> None:
    """Make the hub answer with these files, one for each split."""
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    given = {split: str(path) for split, path in files.items()}
    builder = Parquet(dataset_name="pets", hash="0123456789abcdef", data_files=given)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: builder)


def test_splits_that_number_the_classes_in_different_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": pets("cat", "dog"), "test": pets("dog", "cat")}
    monkeypatch.setattr(hub, "load_hub", lambda _: splits)
    monkeypatch.setattr(sources, "check_hub", lambda _: None)
    data = load_dataset(DataConfig(dataset="owner/pets"), PictureSpec(8, 1))
    for split in (data.train, data.validation, data.test):
        assert (split.images[:][:, 0, 0, 0] % 2).tolist() == split.labels.tolist()


def test_downloaded_files_that_number_the_classes_in_different_ways(
    tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would read the second with the first one's names: it is not let to, and its cache stays empty."""
    train, test, same = tmp_path / "train.parquet", tmp_path / "test.parquet", tmp_path / "same.parquet"
    pets("cat", "dog").to_parquet(train)
    pets("dog", "cat").to_parquet(test)
    pets("cat", "dog").to_parquet(same)
    config = DataConfig(dataset="owner/pets")
    download(monkeypatch, train=train, test=test)
    message = r"owner/pets on the hub has files that number .*, such as test.parquet: download .* from DIR/pets/"
    with pytest.raises(UserError, match=message):
        load_dataset(config, PictureSpec(8, 1))
    assert not list(caches.rglob("*.arrow"))
    download(monkeypatch, train=train, test=same)
    data = load_dataset(config, PictureSpec(8, 1))
    assert (data.test.images[:][:, 0, 0, 0] % 2).tolist() == data.test.labels.tolist()
    assert list(caches.rglob("*.arrow"))


def test_what_the_library_has_cached_needs_no_network(tmp_path: Path, caches: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": pictures, "label": [0, 1] * 6}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    # What load_dataset("owner/MyPets") leaves in the library's cache.
    files = {"train": str(tmp_path / "train.parquet")}
    builder = Parquet(dataset_name="my_pets", hash="0123456789abcdef", data_files=files)
    builder.download_and_prepare()
    (configuration,) = (caches / "huggingface/my_pets").iterdir()
    (caches / "huggingface/owner___my_pets").mkdir()
    configuration.rename(caches / "huggingface/owner___my_pets/default")

    config = DataConfig(dataset="owner/MyPets")
    check_dataset(config)
    data = load_dataset(config, PictureSpec(8, 3))
    assert (data.name, data.class_names) == ("MyPets", ("cat", "dog"))
    splits = (data.train, data.validation, data.test)
    assert sum(map(len, splits)) == 12
    images = torch.cat([split.images[:] for split in splits]).permute(0, 2, 3, 1).numpy()
    assert sorted(image.tobytes() for image in images) == sorted(picture.tobytes() for picture in pictures)
