"""Tables of captions and the original Flickr8k's layout: how they are read and split, and what a mistake says."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.data.samples import load, pairs, pictures, png

from diffmoe.config import DataConfig, UserError
from diffmoe.data.captions import CaptionBatches
from diffmoe.data.loading import Dataset
from diffmoe.data.sources import check_dataset

HARD = ("a 🐕 and a 🐈", "一只狗在雪地里", "a\x00b\x07\u202e", "word " * 2000)


def load_captions(place: Path, **options: Any) -> Dataset:
    assert check_dataset(DataConfig(dataset=str(place), **options)) == "captions"
    return load(place, 4, 1, **options)


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 0.png to 9.png, of grey 0 to 9."""
    (tmp_path / "set" / "pictures").mkdir(parents=True)
    for number in range(10):
        (tmp_path / "set" / "pictures" / f"{number}.png").write_bytes(png(number))
    return tmp_path / "set"


def test_a_csv_with_a_row_a_caption_and_splits(folder: Path) -> None:
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    rows = [[f"pictures/{n}.png", f"grey {n}, number {k}", splits[n]] for k in range(2) for n in range(10)]
    table = write_csv(folder / "captions.csv", [["image", "caption", "split"], *rows])
    for place in (folder, table):
        data = load_captions(place)
        assert pairs(data.train) == {n: (f"grey {n}, number 0", f"grey {n}, number 1") for n in range(6)}
        assert (pairs(data.validation).keys(), pairs(data.test).keys()) == ({6, 7}, {8, 9})


def test_json_lines_without_splits_are_held_out_by_picture(folder: Path) -> None:
    rows = [{"image": f"pictures/{n}.png", "caption_0": f"a {n}", "caption_1": f"b {n}"} for n in range(10)]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load_captions(folder, test_fraction=0.3, val_fraction=0.3)
    found = [pairs(split) for split in (data.train, data.validation, data.test)]
    assert [len(split) for split in found] == [5, 2, 3]
    assert {n: texts for split in found for n, texts in split.items()} == {n: (f"a {n}", f"b {n}") for n in range(10)}
    again = load_captions(folder, test_fraction=0.3, val_fraction=0.3)
    assert pairs(again.test) == pairs(data.test)


def flickr(folder: Path, train: str = "0\n1\n2", test: str = "4") -> None:
    (folder / "pictures").rename(folder / "Flicker8k_Dataset")
    for path in (folder / "Flicker8k_Dataset").iterdir():
        path.rename(path.with_suffix(".jpg"))
    lines = [f"{n}.jpg#{k}\tgrey {n} number {k} .\n" for n in range(5) for k in range(5)]
    (folder / "Flickr8k.token.txt").write_text("".join(lines), encoding="utf-8")
    for part, names in (("train", train), ("dev", "3"), ("test", test)):
        text = "".join(f"{name}.jpg\n" for name in names.split())
        (folder / f"Flickr_8k.{part}Images.txt").write_text(text, encoding="utf-8")


def test_the_original_flickr8k_layout(folder: Path) -> None:
    flickr(folder)
    data = load_captions(folder)
    assert pairs(data.train) == {n: tuple(f"grey {n} number {k} ." for k in range(5)) for n in range(3)}
    assert (pairs(data.validation).keys(), pairs(data.test).keys()) == ({3}, {4})


def test_kaggles_flickr8k_is_a_table_of_captions_and_a_folder_beside_it(folder: Path) -> None:
    (folder / "pictures").rename(folder / "Images")
    (folder / "captions.txt").write_text("image,other\n0.png,a\n")
    with pytest.raises(UserError, match="set has only the class 'Images': there must be 2 or more to tell apart, or c"):
        load_captions(folder)
    rows = [[f"{n}.png", f"A dog , number {k} ."] for n in range(10) for k in range(5)]
    table = write_csv(folder / "captions.txt", [["image", "caption"], *rows])
    for place in (folder, table):
        data = load_captions(place)
        assert (len(data.train), len(data.validation), len(data.test)) == (7, 1, 2)
        assert set(data.train.captions) == {tuple(f"A dog , number {k} ." for k in range(5))}
    (folder / "Images" / "3.png").unlink()
    with pytest.raises(UserError, match=r"captions.txt line 17: there is no picture .*Images/3.png"):
        load_captions(folder)


def test_a_last_line_needs_no_line_end(folder: Path) -> None:
    splits = ["train"] * 8 + ["validation", "test"]
    table = [[f"pictures/{n}.png", f"grey {n}", splits[n]] for n in range(10)]
    for name in ("captions.csv", "captions.jsonl"):
        rows = [["image", "caption", "split"], *table]
        lines = [json.dumps(dict(zip(rows[0], row, strict=True))) for row in table]
        text = "\n".join(lines if name.endswith("l") else map(",".join, rows))
        (folder / name).write_text(text, encoding="utf-8-sig")
        assert pairs(load_captions(folder).test) == {9: ("grey 9",)}
        (folder / name).unlink()
    flickr(folder)
    for path in folder.glob("*.txt"):
        path.write_text("\n\n" + path.read_text("utf-8").removesuffix("\n"), encoding="utf-8-sig")
    data = load_captions(folder)
    assert pairs(data.train) == {n: tuple(f"grey {n} number {k} ." for k in range(5)) for n in range(3)}
    assert pairs(data.test) == {4: tuple(f"grey 4 number {k} ." for k in range(5))}
    (folder / "Flickr_8k.testImages.txt").write_text("\n4.jpg\n\n1.jpg", encoding="utf-8")
    with pytest.raises(UserError, match=r"testImages.txt line 4: 1.jpg is in train already"):
        load_captions(folder)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("0 1 7", "4", r"trainImages.txt line 3: 7.jpg has no caption in Flickr8k.token.txt"),
        ("0 1", "4 1", r"testImages.txt line 2: 1.jpg is in train already: choose one"),
    ],
)
def test_flickr8k_lists_that_will_not_do(folder: Path, train: str, test: str, message: str) -> None:
    flickr(folder, train, test)
    with pytest.raises(UserError, match=message):
        load_captions(folder)


def test_flickr8k_without_a_picture_or_a_caption(folder: Path) -> None:
    flickr(folder)
    tokens = folder / "Flickr8k.token.txt"
    tokens.write_text(tokens.read_text("utf-8") + "9.jpg#0 no tab\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"token.txt line 26 has no caption: it must be 'name.jpg#0<tab>caption'"):
        load_captions(folder)
    (folder / "Flicker8k_Dataset" / "1.jpg").unlink()
    tokens.write_text("".join(tokens.read_text("utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match=r"trainImages.txt line 2: there is no picture .*1.jpg"):
        load_captions(folder)


def test_a_blank_cell_counts_only_where_no_other_has_a_caption(folder: Path) -> None:
    head = ["image", "caption_0", "caption_1"]
    table = [["pictures/0.png", "", "b"], *([f"pictures/{n}.png", "a", " "] for n in range(1, 10))]
    write_csv(folder / "captions.csv", [head, *table])
    lines = [json.dumps({name: cell.strip() or None for name, cell in zip(head, row, strict=True)}) for row in table]
    (folder / "captions.jsonl").write_text("\n \n\n".join(lines) + "\n\n\n")  # nor does a blank line
    for name in ("captions.csv", "captions.jsonl"):
        data = load_captions(folder / name)
        found = {n: t for split in (data.train, data.validation, data.test) for n, t in pairs(split).items()}
        assert found == {0: ("b",)} | {n: ("a",) for n in range(1, 10)}
    write_csv(folder / "captions.csv", [head, ["pictures/0.png", "", " "]])
    with pytest.raises(UserError, match=r"captions.csv line 2 has an empty caption \(number 0\)"):
        load_captions(folder / "captions.csv")


def test_semicolons_separate_cells_where_the_head_has_them(folder: Path) -> None:
    lines = ["image;caption", *(f"pictures/{n}.png;a dog, a cat" for n in range(10))]
    (folder / "captions.csv").write_text("\n".join(lines))
    assert set(load_captions(folder).train.captions) == {("a dog, a cat",)}


def test_a_table_that_windows_wrote_has_backslashes_in_its_paths(folder: Path) -> None:
    (folder / "odd\\name.png").write_bytes(png(9))  # which a name may have elsewhere
    names = [*(f"pictures\\{n}.png" for n in range(9)), "odd\\name.png"]
    write_csv(folder / "captions.csv", [["image", "caption"], *([name, f"grey {n}"] for n, name in enumerate(names))])
    data = load_captions(folder)
    found = {n: texts for split in (data.train, data.validation, data.test) for n, texts in pairs(split).items()}
    assert found == {n: (f"grey {n}",) for n in range(10)}


def test_hard_texts_go_through(folder: Path) -> None:
    rows = [{"image": f"pictures/{n}.png", "caption": HARD[n % 4]} for n in range(10)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load_captions(folder)
    assert {texts[0] for texts in data.train.captions} == set(HARD)
    batches = CaptionBatches(data.train, 4, max_text_len=16, picture=data.picture, shuffle=True)
    for batch in batches.epoch():
        assert batch.tokens.shape[1] <= 16


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["image", "text"], ["pictures/0.png", "a"]], r"captions.csv line 2 has image, text: it must have image and"),
        ([["image", "caption"], ["pictures/0.png", " "]], r"captions.csv line 2 has an empty caption \(number 0\)"),
        ([["image", "caption"], ["pictures/0.png"]], r"captions.csv line 2 has image: it must have image and caption"),
        ([["image", "caption"], ["", "a"]], r"captions.csv line 2 names no picture: write the path of one under image"),
        ([["image", "caption"], ["nowhere.png", "a"]], r"captions.csv line 2: there is no picture .*nowhere.png"),
        ([["image", "caption"], ["pictures/0.png", "a", "b"]], r"line 2 has more cells than the head: quote captions"),
        ([["image", "caption", "split"], ["pictures/0.png", "a", "dev"]], r"line 2 has the split 'dev': it must be"),
        (
            [["image", "caption", "split"], ["pictures/0.png", "a", "train"], ["pictures/0.png", "b", "test"]],
            r"line 3 puts pictures/0.png in test, but it is in train already: choose one",
        ),
        (
            [["image", "caption", "split"], ["pictures/0.png", "a", "train"], ["./pictures//0.png", "b", "test"]],
            r"line 3 puts pictures/0.png in test, but it is in train already: choose one",
        ),
        ([["image", "caption", "split"], ["pictures/0.png", "a", "test"]], r"has no pictures to train on"),
        ([["image", "caption"]], r"has no pictures to train on"),
        ([["image", "caption"], ["word " * 99, "a"]], r"captions.csv line 2: there is no picture .*word"),
    ],
)
def test_a_table_that_will_not_do(folder: Path, rows: list[list[str]], message: str) -> None:
    write_csv(folder / "captions.csv", rows)
    with pytest.raises(UserError, match=message):
        load_captions(folder)


def test_files_that_will_not_do(folder: Path) -> None:
    (folder / "captions.csv").write_bytes(b"image,caption\npictures/0.png,caf\xe9\n")
    with pytest.raises(UserError, match=r"captions.csv line 2 is not UTF-8: save the file as UTF-8"):
        load_captions(folder)
    (folder / "captions.csv").rename(folder / "one.csv")
    (folder / "two.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match=r"holds 2 tables: name the one with the captions captions.csv, .tsv or .jsonl"):
        load_captions(folder)
    (folder / "one.csv").unlink()
    with pytest.raises(UserError, match=r"two.jsonl line 1 is not valid JSON"):
        load_captions(folder)
    (folder / "two.jsonl").write_text('["a"]\n')
    with pytest.raises(UserError, match=r"two.jsonl line 1 must be an object such as"):
        load_captions(folder)
    for caption, message in (
        ([["a"], None], r"two.jsonl line 1 has the caption \['a'\] \(number 0\): it must be text"),
        (["a", None], r"two.jsonl line 1 has an empty caption \(number 1\)"),
        ({"raw": "a"}, r"two.jsonl line 1 has the caption {'raw': 'a'} \(number 0\): it must be text"),
    ):
        (folder / "two.jsonl").write_text(json.dumps({"image": "pictures/0.png", "caption": caption}))
        with pytest.raises(UserError, match=message):
            load_captions(folder)
    (folder / "captions.jsonl").write_text("")
    (folder / "captions.csv").write_text("")
    with pytest.raises(UserError, match=r"holds 2 tables"):
        load_captions(folder)


@pytest.mark.parametrize("name", ["captions.tsv", "mine.TSV"])
def test_a_tsv_table_is_read(tmp_path: Path, name: str) -> None:
    names = pictures(tmp_path / "s")
    (tmp_path / "s" / name).write_text("image\tcaption\n" + "".join(f"{n}\ta, b {n}\n" for n in names))
    data = load(tmp_path / "s")
    assert len(data.train) + len(data.validation) + len(data.test) == 10
    assert all(text.startswith("a, b ") for text in data.train.texts)


HOSTILE = {
    "[" * 100_000: "is nested too deep: it must be an object of texts",
    '{"image": "0.png", "caption": ' + '{"a":' * 100_000 + "}": "is nested too deep",
    '{"image": "0.png", "caption": "\\ud83d"}': r"has half of a character in its caption \(number 0\)",
    '{"image": "\\ud83d", "caption": "a"}': "there is no picture",
    '{"image": "a\\u0000.png", "caption": "a"}': "there is no picture",
    '{"image": "' + "x" * 5000 + '", "caption": "a"}': "there is no picture",
    '{"' + "x" * 5000 + '": "a"}': "it must have image and caption",
    '{"image": ' + "9" * 5000 + "}": "is not valid JSON",
    '{"image": "0.png", "caption": ' + "[" * 900 + "]" * 900 + "}": "it must be text",
}


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_json_is_one_short_line(tmp_path: Path, line: str) -> None:
    pictures(tmp_path / "s")
    (tmp_path / "s/captions.jsonl").write_text('{"image": "1.png", "caption": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=HOSTILE[line]) as caught:
        load(tmp_path / "s")
    assert "captions.jsonl line 2" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_table_of_very_many_columns_is_read_at_once(tmp_path: Path) -> None:
    """Looking each name up among all would take minutes."""
    pictures(tmp_path / "s")
    names = ",".join(f"caption_{n}" for n in range(50_000))
    (tmp_path / "s/captions.csv").write_text(f"image,{names}\n" + "".join(f"{n}.png,w\n" for n in range(10)))
    assert len(load(tmp_path / "s").train) > 0
