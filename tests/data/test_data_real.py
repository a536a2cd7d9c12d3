"""The real sets, as they lie beside the checkout."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffmoe.config import DataConfig
from diffmoe.data import LazyImages, check_dataset, class_descriptions
from diffmoe.data.descriptions import CIFAR10, FASHION_MNIST
from diffmoe.data.sources import find_source
from diffmoe.data.tables import ParquetSource

FOLDER = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the real datasets are not in {FOLDER}"),
]


@pytest.mark.parametrize(
    ("dataset", "column", "rows", "size", "channels"),
    [("cifar10", "img", (50_000, 10_000), 32, 3), ("fashion_mnist", "image", (60_000, 10_000), 28, 1)],
)
def test_rows_names_and_first_picture(
    dataset: str, column: str, rows: tuple[int, int], size: int, channels: int
) -> None:
    config = DataConfig(dataset=dataset, data_dir=str(FOLDER))
    assert check_dataset(config) == "classification"
    source = find_source(config)
    assert isinstance(source, ParquetSource)
    assert len(source) == sum(rows)
    class_names, splits = source.read(in_memory=True)
    assert tuple(len(splits[name].labels) for name in ("train", "test")) == rows

    described = FASHION_MNIST if dataset == "fashion_mnist" else CIFAR10
    assert class_descriptions(dataset, class_names) == [list(sentences) for sentences in described.values()]
    for pictures, labels in splits.values():
        assert torch.equal(torch.bincount(labels), torch.full((10,), len(labels) // 10))
        first = LazyImages.of(pictures, size, channels)[0]
        assert first.shape == (channels, size, size)
    path = next((FOLDER / dataset).glob("train-*.parquet"))
    row = pq.read_table(path).slice(0, 1).to_pylist()[0]
    expected = np.asarray(Image.open(io.BytesIO(row[column]["bytes"])))
    found = LazyImages.of(splits["train"].pictures, size, channels)[0].permute(1, 2, 0).squeeze(-1)
    assert np.array_equal(found.numpy(), expected)
    assert splits["train"].labels[0] == row["label"]


def test_flickr8k_is_the_official_split_with_five_captions_each() -> None:
    config = DataConfig(dataset="flickr8k", data_dir=str(FOLDER))
    assert check_dataset(config) == "captions"
    source = find_source(config)
    assert isinstance(source, ParquetSource)
    splits = source.read_captions(in_memory=True)
    assert {name: len(split.pictures) for name, split in splits.items()} == {
        "train": 6000,
        "validation": 1000,
        "test": 1000,
    }
    assert all(len(texts) == 5 for split in splits.values() for texts in split.captions)
    path = next((FOLDER / "flickr8k").glob("test-*.parquet"))
    row = pq.read_table(path).slice(7, 1).to_pylist()[0]
    assert splits["test"].captions[7] == tuple(row[f"caption_{number}"] for number in range(5))
    assert splits["test"].pictures.read([7]) == [row["image"]["bytes"]]
