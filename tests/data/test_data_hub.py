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
from diffmoe.data import check_dataset, hub, load_dataset

CIFAR10 = DataConfig(dataset="cifar10")


def test_offline_and_not_cached() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot get uoft-cs/cifar10 from the hub .*--data_dir DIR") as caught:
        check_dataset(CIFAR10)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


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
    monkeypatch.setattr(datasets, "load_dataset", download)
    with pytest.raises(UserError, match="connection lost") as caught:
        load_dataset(CIFAR10, img_size=8, in_channels=3)
    assert "\n" not in str(caught.value)


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
    data = load_dataset(config, img_size=8, in_channels=3)
    assert (data.name, data.class_names) == ("MyPets", ("cat", "dog"))
    splits = (data.train, data.validation, data.test)
    assert sum(map(len, splits)) == 12
    images = torch.cat([split.images[:] for split in splits]).permute(0, 2, 3, 1).numpy()
    assert sorted(image.tobytes() for image in images) == sorted(picture.tobytes() for picture in pictures)
