"""The data's settings: impossible values, what a set is called, and whose it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.config.mistakes import check_told

from diffmoe.config import EMBEDDED_DATASETS, DataConfig, dataset_name

IMPOSSIBLE: list[tuple[str, Any, str]] = [
    *((name, 1.0, "not including, 1") for name in ("val_fraction", "test_fraction", "erase")),
    *((name, 0.0, "over 0") for name in ("val_fraction", "test_fraction")),
    *((name, value, "at least 0") for name in ("mixup", "cutmix") for value in (-0.1, math.nan)),
    *((name, -1, "at least 0") for name in ("crop_padding", "cutout", "max_memory_gb", "num_workers", "split_seed")),
    ("split_seed", 2**64, "at most|less|below"),  # torch's generators take 64 bits
]


@pytest.mark.parametrize(("name", "value", "right"), IMPOSSIBLE)
def test_impossible_value_is_one_line(name, value, right):
    check_told(DataConfig, name, value, right)


@pytest.mark.parametrize(
    ("dataset", "name"), [("cifar10", "cifar10"), ("owner/pets", "pets"), ("/data/pets/", "pets"), ("/", "data")]
)
def test_dataset_name(dataset, name):
    assert dataset_name(dataset) == name


def test_a_folder_that_is_named_by_dots_is_called_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "pets" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pets" / "train")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [dataset_name(name) for name in (".", "..", "../train/..", "~/pets", "~")] == [
        *("train", "pets", "pets", "pets", tmp_path.name)
    ]


def test_a_set_in_data_dir_is_the_users_own_whatever_it_is_called():
    for name in EMBEDDED_DATASETS:
        assert DataConfig(dataset=name).built_in
        assert not DataConfig(dataset=name, data_dir="sets").built_in
        assert not DataConfig(dataset=f"./{name}").built_in
    assert not DataConfig(dataset="cifar10").built_in
