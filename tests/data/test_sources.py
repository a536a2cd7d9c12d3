"""From a name to where a set is: what wins where several places have it, and what a mistake says."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.data.samples import captioned, labelled, load, pictures

from diffmoe.config import DataConfig, UserError
from diffmoe.data.captions import CaptionSplit
from diffmoe.data.descriptions import class_descriptions, described_sets
from diffmoe.data.parquet import ParquetSource
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.sources import check_dataset, find_source
from diffmoe.data.splits import Split


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


@pytest.mark.parametrize("data_dir", ["..", "."])
def test_data_dir_may_hold_the_set_or_be_it(picture_folder: Path, data_dir: str) -> None:
    assert len(load("pets", data_dir=str(picture_folder / data_dir)).test) == 12


def test_a_set_in_the_working_folder_comes_before_the_hub(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture_folder.rename(tmp_path / "cifar10")
    monkeypatch.chdir(tmp_path)
    assert load("cifar10").class_names == ("bird", "cat", "dog")
    shutil.rmtree(tmp_path / "cifar10")
    (tmp_path / "cifar10").mkdir()  # of some other use
    with pytest.raises(UserError, match="from the hub"):
        check_dataset(DataConfig(dataset="cifar10"))


def test_mistakes_in_data_dir(picture_folder: Path) -> None:
    with pytest.raises(UserError, match="data_dir is '/nowhere': it must be a folder that exists"):
        check_dataset(DataConfig(dataset="pets", data_dir="/nowhere"))
    with pytest.raises(UserError, match=r"there is no '.*/pet' \(did you mean 'pets'\?\)"):
        check_dataset(DataConfig(dataset="pet", data_dir=str(picture_folder.parent)))
    with pytest.raises(UserError, match=r"there is no '.*/cifar10'"):  # and no download behind the user's back
        check_dataset(DataConfig(dataset="cifar10", data_dir=str(picture_folder.parent)))


@pytest.mark.parametrize(("name", "other"), [("digits", "shapes"), ("shapes", "digits")])
def test_a_data_dir_without_the_set_is_an_error(tmp_path: Path, name: str, other: str) -> None:
    labelled(tmp_path / "sets" / other, "one", "two")
    message = rf"which has no {name} in it: the {name} that the program brings need no data_dir, .* in '.*sets/{name}'"
    with pytest.raises(UserError, match=message):
        check_dataset(DataConfig(dataset=name, data_dir=str(tmp_path / "sets")))
    with pytest.raises(UserError, match="data_dir is '/nowhere': it must be a folder that exists"):
        check_dataset(DataConfig(dataset=name, data_dir="/nowhere"))
    (tmp_path / "sets" / name).mkdir()
    with pytest.raises(UserError, match=rf"sets/{name} holds no dataset"):
        check_dataset(DataConfig(dataset=name, data_dir=str(tmp_path / "sets")))


def test_a_set_that_is_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(tmp_path / "a" / "pets", "one", "two")
    labelled(tmp_path / "b" / "pets", "cat", "dog")
    monkeypatch.chdir(tmp_path)
    for name in ("./a/pets", "a/pets", str(tmp_path / "a" / "pets")):
        with pytest.raises(
            UserError, match=r"dataset is '.*a/pets', which is there, and data_dir holds 'b/pets': give one"
        ):
            load(name, data_dir="b")
        assert load(name, data_dir="a").class_names == ("one", "two")  # the same
    assert load("owner/pets", data_dir="b").class_names == ("cat", "dog")


def test_a_table_in_data_dir_is_the_one_that_is_named(tmp_path: Path) -> None:
    captioned(tmp_path / "set", "captions.csv", "first")
    captioned(tmp_path / "set", "more.csv", "second")
    data = load("more.csv", data_dir=str(tmp_path / "set"))
    assert {text.split()[0] for (text,) in data.train.captions} == {"second"}


TABLES = {"labels.csv": "id,label\n0.png,one\n", "sample_submission.csv": "id\n", "meta.jsonl": '{"id": 1}\n'}


@pytest.mark.parametrize("classes", ["train", "."])
def test_tables_beside_class_folders_are_no_captions_unless_named_so(tmp_path: Path, classes: str) -> None:
    for name in ("one", "two"):
        pictures(tmp_path / "set" / classes / name)
    config = DataConfig(dataset=str(tmp_path / "set"))
    for name, text in TABLES.items():
        (tmp_path / "set" / name).write_text(text)
        assert check_dataset(config) == "classification"
        assert load(tmp_path / "set").class_names == ("one", "two")
    more = tmp_path / "set" / ("captions.csv" if classes == "train" else "of_mine.csv")
    more.write_text("image,caption\n" + "".join(f"{classes}/one/{number}.png,w\n" for number in range(10)))
    assert check_dataset(config) == "captions"
    if classes == "train":
        more.rename(more.with_name("of_mine.csv"))
        assert check_dataset(config) == "classification"


# --- The real sets, as they lie beside the checkout ---


@pytest.mark.data
@pytest.mark.parametrize(
    ("dataset", "column", "rows", "size", "channels"),
    [("cifar10", "img", (50_000, 10_000), 32, 3), ("fashion_mnist", "image", (60_000, 10_000), 28, 1)],
)
def test_rows_names_and_first_picture(
    data_dir: Path, dataset: str, column: str, rows: tuple[int, int], size: int, channels: int
) -> None:
    config = DataConfig(dataset=dataset, data_dir=str(data_dir))
    assert check_dataset(config) == "classification"
    source = find_source(config)
    assert isinstance(source, ParquetSource)
    assert len(source) == sum(rows)
    class_names, splits = source.read(PictureSpec(size, channels), in_memory=True)
    labels, pictures = {}, {}
    for name, split in splits.items():
        assert isinstance(split, Split)
        labels[name], pictures[name] = split.labels, split.images
        assert torch.equal(torch.bincount(split.labels), torch.full((10,), len(split.labels) // 10))
        assert pictures[name][0].shape == (channels, size, size)
    assert tuple(len(labels[name]) for name in ("train", "test")) == rows

    described = described_sets()[dataset]
    assert class_descriptions(dataset, class_names) == [list(sentences) for sentences in described.values()]
    path = next((data_dir / dataset).glob("train-*.parquet"))
    row = pq.read_table(path).slice(0, 1).to_pylist()[0]
    expected = np.asarray(Image.open(io.BytesIO(row[column]["bytes"])))
    assert np.array_equal(pictures["train"][0].permute(1, 2, 0).squeeze(-1).numpy(), expected)
    assert labels["train"][0] == row["label"]


@pytest.mark.data
def test_flickr8k_is_the_official_split_with_five_captions_each(data_dir: Path) -> None:
    config = DataConfig(dataset="flickr8k", data_dir=str(data_dir))
    assert check_dataset(config) == "captions"
    source = find_source(config)
    assert isinstance(source, ParquetSource)
    class_names, splits = source.read(PictureSpec(8, 3), in_memory=True)
    assert class_names == ()
    sizes = {name: len(split) for name, split in splits.items()}
    assert sizes == {"train": 6000, "validation": 1000, "test": 1000}
    for split in splits.values():
        assert isinstance(split, CaptionSplit)
        assert all(len(texts) == 5 for texts in split.captions)
    test = splits["test"]
    assert isinstance(test, CaptionSplit)
    path = next((data_dir / "flickr8k").glob("test-*.parquet"))
    row = pq.read_table(path).slice(7, 1).to_pylist()[0]
    assert test.captions[7] == tuple(row[f"caption_{number}"] for number in range(5))
    assert isinstance(test.images, LazyImages)
    assert test.images.pictures.read([7]) == [row["image"]["bytes"]]
