"""Parquet files: columns, labels and rows, and what a mistake in them says."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.data.samples import greys, pairs, png
from tests.data.samples import load as load_set

from diffmoe.config import DataConfig, UserError
from diffmoe.data.loading import Dataset
from diffmoe.data.pictures import LazyImages
from diffmoe.data.sources import check_dataset

NAMES = ["red", "green", "blue"]


def write(
    path: Path, pictures: Sequence[Any], labels: Sequence[Any] | pa.Array, names: list[str] | None = None
) -> None:
    path.parent.mkdir(exist_ok=True)
    cells = [{"bytes": picture, "path": None} for picture in pictures]
    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array(cells, picture_type), "label": labels, "more": labels})
    if names is not None:
        features = {
            "img": {"_type": "Image"},
            "label": {"names": names, "_type": "ClassLabel"},
            "more": {"dtype": "int64", "_type": "Value"},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    """30 training rows in two files and 6 test rows: row r of train has grey r and class r % 3."""
    folder = tmp_path / "greys"
    rows = list(range(30))
    write(folder / "train-00000-of-00002.parquet", [png(r) for r in rows[:20]], [r % 3 for r in rows[:20]], NAMES)
    write(folder / "train-00001-of-00002.parquet", [png(r) for r in rows[20:]], [r % 3 for r in rows[20:]], NAMES)
    write(folder / "test-00000-of-00001.parquet", [png(r) for r in range(100, 106)], [0, 1, 2, 0, 1, 2], NAMES)
    return folder


def load(folder: Path, **options: Any) -> Dataset:
    return load_set(folder, 6, 1, **options)


@pytest.mark.parametrize("max_memory_gb", [4.0, 0.0])
def test_rows_names_and_splits(parquet_folder: Path, max_memory_gb: float) -> None:
    data = load(parquet_folder, max_memory_gb=max_memory_gb)
    assert isinstance(data.train.images, LazyImages) == (max_memory_gb == 0)
    assert data.class_names == tuple(NAMES)
    assert greys(pickle.loads(pickle.dumps(data.test))) == greys(data.test)  # as worker processes get it
    assert greys(data.test) == list(range(100, 106))
    assert sorted(greys(data.train) + greys(data.validation)) == list(range(30))
    for split in (data.train, data.validation):
        assert [grey % 3 for grey in greys(split)] == split.labels.tolist()
        assert split.labels.dtype == torch.int64


def test_a_copy_of_a_hub_repository_keeps_its_files_in_data(parquet_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    parquet_folder.rename(tmp_path / "repository/data")
    assert len(load(tmp_path / "repository").test) == 6


@pytest.mark.parametrize(("values", "names"), [([10, 2, 7], ("2", "7", "10")), (["x", "y", "w"], ("w", "x", "y"))])
def test_without_metadata_the_classes_are_the_sorted_labels(tmp_path: Path, values: list[Any], names: Any) -> None:
    labels = values * 4
    write(tmp_path / "s/train.parquet", [png(r) for r in range(12)], labels)
    data = load(tmp_path / "s")
    assert data.class_names == names
    for split in (data.train, data.validation, data.test):
        assert [data.class_names[label] for label in split.labels] == [str(labels[grey]) for grey in greys(split)]


def test_bytes_without_a_struct_are_pictures_too(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    table = pa.table({"image": [png(r) for r in range(12)], "label": [0, 1] * 6})
    pq.write_table(table, tmp_path / "s/train.parquet")
    assert len(load(tmp_path / "s").train) > 0


@pytest.mark.parametrize("max_memory_gb", [4.0, 0.0])
@pytest.mark.parametrize(("picture", "why"), [(png(1)[:-30], "cannot be decoded"), (None, "has no picture")])
def test_a_bad_picture_is_named_by_file_and_row(
    parquet_folder: Path, picture: bytes | None, why: str, max_memory_gb: float
) -> None:
    path = parquet_folder / "train-00001-of-00002.parquet"
    pictures = [png(r) for r in range(20, 30)]
    write(path, [*pictures[:4], picture, *pictures[5:]], [r % 3 for r in range(20, 30)], NAMES)
    with pytest.raises(UserError, match=f"{path.name} row 4 {why}") as caught:
        load(parquet_folder, max_memory_gb=max_memory_gb)  # lazily, the sample for the mean reads it
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, 3, 0], NAMES, "row 2 has the label 3: it must be one of 0 to 2"),
        ([0, -1, 2, 0], NAMES, "row 1 has the label -1"),
        ([0, 1, None, 0], None, "row 2 has the label None"),
        ([[0], [1], [2], [1]], None, "labels of type list"),
        ([0.5, 1.0, 2.0, 1.0], None, "labels of type double: they must be whole numbers or class names"),
    ],
)
def test_bad_labels(tmp_path: Path, labels: list[Any], names: list[str] | None, message: str) -> None:
    write(tmp_path / "s/train-0.parquet", [png(r) for r in range(4)], labels, names)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "s")


@pytest.mark.parametrize("max_memory_gb", [4.0, 0.0])
@pytest.mark.parametrize("names", [["cat"], None])
def test_one_class_is_refused_before_a_picture_is_decoded(
    tmp_path: Path, names: list[str] | None, max_memory_gb: float
) -> None:
    write(tmp_path / "s/train-0.parquet", [b"no picture"] * 4, [0] * 4 if names else ["cat"] * 4, names)
    with pytest.raises(UserError, match=r"train-0\.parquet has only the class 'cat': there must be 2 or more"):
        load(tmp_path / "s", max_memory_gb=max_memory_gb)


def test_a_test_label_that_train_does_not_have(tmp_path: Path) -> None:
    write(tmp_path / "s/train-0.parquet", [png(r) for r in range(4)], ["a", "a", "b", "b"])
    write(tmp_path / "s/test-0.parquet", [png(r) for r in range(2)], ["a", "c"])
    with pytest.raises(UserError, match=r"test-0\.parquet row 1 has the label 'c'"):
        load(tmp_path / "s")


@pytest.mark.parametrize("max_memory_gb", [4.0, 0.0])
def test_each_file_is_read_with_its_own_names(parquet_folder: Path, max_memory_gb: float) -> None:
    """Grey r is of class r % 3 throughout; the second file of train and that of test number the classes otherwise."""
    other, texts = ["blue", "red", "green"], "train-00002-of-00003.parquet"
    write(
        parquet_folder / "train-00001-of-00002.parquet",
        [png(r) for r in range(20, 30)],
        pa.array([other.index(NAMES[r % 3]) for r in range(20, 30)], pa.int32()),
        other,
    )
    write(parquet_folder / texts, [png(r) for r in range(30, 36)], [NAMES[r % 3] for r in range(30, 36)])
    test = parquet_folder / "test-00000-of-00001.parquet"
    write(test, [png(r) for r in range(99, 105)], [other.index(NAMES[r % 3]) for r in range(99, 105)], other)
    for _ in range(2):  # the second time from the cache
        data = load(parquet_folder, max_memory_gb=max_memory_gb)
        assert data.class_names == tuple(NAMES)
        assert greys(data.test) == list(range(99, 105))
        assert sorted(greys(data.train) + greys(data.validation)) == list(range(36))
        for split in (data.train, data.validation, data.test):
            assert [grey % 3 for grey in greys(split)] == split.labels.tolist()
    write(test, [png(r) for r in range(99, 105)], [0, 1, 2, 0, 1, 2], ["red", "teal", "blue"])
    with pytest.raises(UserError, match=rf"{test.name} row 1 has the label 'teal': it must be one of 'red' to 'blue'"):
        load(parquet_folder, max_memory_gb=max_memory_gb)


def test_files_of_a_split_have_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    columns = {"image": [png(0)] * 3, "caption_0": ["a"] * 3}
    pq.write_table(pa.table(columns), tmp_path / "s/train-0.parquet")
    pq.write_table(pa.table({**columns, "caption_1": ["b"] * 3}), tmp_path / "s/train-1.parquet")
    with pytest.raises(
        UserError, match=r"train-1\.parquet has image, caption_0, caption_1, but .*0\.parquet has image, c"
    ):
        check_dataset(DataConfig(dataset=str(tmp_path / "s")))
    (tmp_path / "s/train-1.parquet").unlink()
    pq.write_table(pa.table({"image": [png(0)], "label": [0]}), tmp_path / "s/test-0.parquet")
    with pytest.raises(UserError, match=r"test-0\.parquet has image, label, but .*: both must be of one kind"):
        check_dataset(DataConfig(dataset=str(tmp_path / "s")))


@pytest.mark.parametrize("empty", ["train", "test"])
def test_an_empty_split(tmp_path: Path, empty: str) -> None:
    for split in ("train", "test"):
        rows = 0 if split == empty else 12
        labels = pa.array([r % 3 for r in range(rows)], pa.int64())
        write(tmp_path / f"s/{split}-0.parquet", [png(r) for r in range(rows)], labels, NAMES)
    with pytest.raises(UserError, match=f"has an empty {empty} split"):
        load(tmp_path / "s")


def test_a_split_under_two_names(parquet_folder: Path) -> None:
    for name in ("valid-0.parquet", "val-0.parquet"):
        write(parquet_folder / name, [png(0)], [0], NAMES)
    with pytest.raises(UserError, match=r"greys has both val and valid, which are one split: keep one of them"):
        check_dataset(DataConfig(dataset=str(parquet_folder)))


def test_files_that_will_not_do(parquet_folder: Path, tmp_path: Path) -> None:
    (parquet_folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(UserError, match=r"test-00000-of-00001\.parquet must be a Parquet file"):
        load(parquet_folder)
    (tmp_path / "captions").mkdir()
    pq.write_table(pa.table({"image": [png(0)], "text": ["a"]}), tmp_path / "captions/train-0.parquet")
    expected = "has the columns image, text: it must have image or img, and label or caption, caption_0"
    with pytest.raises(UserError, match=expected):
        check_dataset(DataConfig(dataset="captions", data_dir=str(tmp_path)))


# --- Captions ---


def write_captions(folder: Path, columns: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    cells = [{"bytes": png(n), "path": None} for n in range(len(next(iter(columns.values()))))]
    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, picture_type), **columns}), folder / "train-0.parquet")
    return folder


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    "columns",
    [
        {"caption_0": [f"a {n}" for n in range(8)], "caption_1": [f"b {n}" for n in range(8)]},
        {"captions": [[f"a {n}", f"b {n}"] for n in range(8)]},
    ],
)
def test_columns_of_texts_or_of_lists(tmp_path: Path, columns: dict[str, Any], in_memory: bool) -> None:
    place = write_captions(tmp_path / "set", columns)
    for _ in range(2):  # the second time from the cache
        data = load(place, max_memory_gb=4.0 if in_memory else 0.0)
        assert isinstance(data.train.images, LazyImages) != in_memory
        found = [pairs(split) for split in (data.train, data.validation, data.test)]
        assert {n: t for split in found for n, t in split.items()} == {n: (f"a {n}", f"b {n}") for n in range(8)}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": [1, 2]}, r"train-0.parquet row 0 has the caption 1 \(number 0\): it must be text"),
        ({"caption_0": ["a", None]}, r"train-0.parquet row 1 has an empty caption \(number 0\)"),
        ({"captions": [["a"], []]}, r"train-0.parquet row 1 has no caption: a picture must have at least one"),
    ],
)
def test_bad_captions(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write_captions(tmp_path / "set", columns))


@pytest.mark.parametrize("max_memory_gb", [4.0, 0.0])
@pytest.mark.parametrize("told", ["label", "caption"])
def test_a_column_of_paths_is_read_from_where_the_file_is(tmp_path: Path, told: str, max_memory_gb: float) -> None:
    place = tmp_path / "s"
    (place / "images").mkdir(parents=True)
    for n in range(10):
        (place / f"images/{n}.png").write_bytes(png(n))
    names = [f"images/{n}.png" for n in range(9)] + [str(place / "images/9.png")]
    pq.write_table(pa.table({"image": names, told: list("ab" * 5)}), place / "train.parquet")

    def read() -> list[int]:
        data = load(place, max_memory_gb=max_memory_gb)
        return sorted(greys(data.train) + greys(data.validation) + greys(data.test))

    assert read() == list(range(10))
    (place / "images/0.png").write_bytes(png(200))
    assert read() == [*range(1, 10), 200]  # not from the cache
    (place / "images/4.png").unlink()
    with pytest.raises(UserError, match="No such file or directory: it must be a picture that can be read"):
        read()


@pytest.mark.parametrize("blank", ["", " ", None])
def test_a_blank_second_caption_is_passed_over(tmp_path: Path, blank: str | None) -> None:
    columns = {"caption_0": [f"a {n}" for n in range(8)], "caption_1": [blank, *(f"b {n}" for n in range(1, 8))]}
    data = load(write_captions(tmp_path / "set", columns))
    found = [pairs(split) for split in (data.train, data.validation, data.test)]
    told = {n: t for split in found for n, t in split.items()}
    assert told == {0: ("a 0",)} | {n: (f"a {n}", f"b {n}") for n in range(1, 8)}
