"""A number means what its own file calls it; a class is known by its name."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmoe.config import UserError
from diffmoe.data.labels import FileLabels, encode_labels, listed_names

NAMES = ("red", "green", "blue")


def file(where: str, values: list[Any], *names: str, kind: pa.DataType | None = None) -> FileLabels:
    return FileLabels(where, pa.chunked_array([pa.array(values, kind)]), names)


@given(data=st.data())
def test_each_row_keeps_its_name_however_its_file_writes_it(data: st.DataObject) -> None:
    """Files of both splits, as numbers in an order of their own or as texts; the first of train lists all names."""
    written: dict[str, list[FileLabels]] = {}
    expected: dict[str, list[str]] = {}
    for split in ("train", "test"):
        written[split], expected[split] = [file("first", [], *NAMES, kind=pa.int64())], []
        for number in range(data.draw(st.integers(0, 3))):
            rows = data.draw(st.lists(st.sampled_from(NAMES), max_size=5))
            order = data.draw(st.permutations(NAMES))
            as_texts = data.draw(st.booleans())
            values = rows if as_texts else [order.index(name) for name in rows]
            kind = pa.string() if as_texts else data.draw(st.sampled_from([pa.int64(), pa.int32(), pa.uint8()]))
            written[split] += [file(f"{split}-{number}", values, *(() if as_texts else order), kind=kind)]
            expected[split] += rows
    class_names, encoded = encode_labels(written)
    assert class_names == NAMES
    for split, rows in expected.items():
        assert [class_names[label] for label in encoded[split].tolist()] == rows


@pytest.mark.parametrize(
    ("train", "test", "class_names", "encoded"),
    [
        # Numbers without names are train's numbers, those of its list or its own.
        ([file("a", [0, 1, 2], *NAMES)], file("b", [2, 0]), NAMES, [2, 0]),
        ([file("a", [10, 2, 7])], file("b", [7, 10]), ("2", "7", "10"), [1, 2]),
        # Where train has numbers alone these are the names.
        ([file("a", [0, 1])], file("b", [0, 0, 1], "1", "0"), ("0", "1"), [1, 1, 0]),
        ([file("a", [0, 1])], file("b", ["1", "0"]), ("0", "1"), [1, 0]),
        ([file("a", ["x", "w"])], file("b", [1, 0], "w", "x"), ("w", "x"), [1, 0]),
        # A file's list may be longer than what its rows have, or than train's.
        ([file("a", [0, 1], *NAMES)], file("b", [1, 1], "pink", "blue"), NAMES, [2, 2]),
        # Train's classes are those of all its files.
        ([file("a", [0], "red", "blue"), file("b", [0], "green")], file("c", ["green"]), (*NAMES[::2], "green"), [2]),
        ([file("a", [0], "red"), file("b", ["green", "blue"])], file("c", ["green"]), ("red", "blue", "green"), [2]),
    ],
)
def test_labels_of_one_file_read_with_those_of_others(
    train: list[FileLabels], test: FileLabels, class_names: tuple[str, ...], encoded: list[int]
) -> None:
    found, splits = encode_labels({"train": train, "test": [test]})
    assert found == class_names
    assert splits["test"].tolist() == encoded


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([file("a", [0], *NAMES)], file("b", [0, 1], "blue", "teal"), "b row 1 has the label 'teal'.*one of 'red' to"),
        ([file("a", [0], *NAMES)], file("b", ["blue", "Blue"]), "b row 1 has the label 'Blue'.*'red' to 'blue'"),
        ([file("a", [0], *NAMES)], file("b", [-1], *NAMES), "b row 0 has the label -1: it must be one of 0 to 2"),
        ([file("a", [0], *NAMES)], file("b", [3]), "b row 0 has the label 3: it must be one of 0 to 2"),
        ([file("a", [0, 1])], file("b", [0], "red", "green"), "b row 0 has the label 'red': it must be one of '0' to"),
        # Numbers that nothing gives a meaning: train has names alone, or several numberings.
        ([file("a", ["x", "w"])], file("b", [0]), "b row 0 has the label 0: it must be one of 'w' to 'x'"),
        ([file("a", ["x"]), file("b", [0])], file("c", ["x"]), "b row 0 has the label 0: it must be one of 'x' to"),
        (
            [file("a", [0], "red", "blue"), file("b", [0], "blue", "red")],
            file("c", [0]),
            "c row 0 has the label 0: it must be one of 'red' to 'blue', the classes of train",
        ),
    ],
)
def test_labels_that_train_does_not_have(train: list[FileLabels], test: FileLabels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_labels({"train": train, "test": [test]})


def test_a_list_with_a_name_twice() -> None:
    with pytest.raises(UserError, match="a calls 2 classes 'red': each must have a name of its own"):
        file("a", [0], "red", "blue", "red")


def test_names_are_read_whatever_the_numbers_type() -> None:
    features = {
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
        "more": {"names": ["a"], "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for kind in (pa.int64(), pa.int8()):
        assert listed_names(pa.schema([("label", kind)], metadata)) == ("cat", "dog")
    for other in (None, {}, {"pandas": "{}"}, {"huggingface": "{}"}, {"huggingface": '{"info": {"features": null}}'}):
        assert listed_names(pa.schema([("label", pa.int64())], other)) == ()
