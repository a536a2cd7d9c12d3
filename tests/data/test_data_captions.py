"""Captioned sets: where they are found, how they are split and batched, and what a mistake in one says."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffmoe.config import DataConfig, UserError
from diffmoe.data import (
    END_ID,
    CaptionBatch,
    CaptionBatches,
    CaptionDataset,
    CaptionSplit,
    LazyImages,
    caption_tokens,
    check_dataset,
    detokenize,
    load_captions,
    load_dataset,
    used_tokens,
)

HARD = ("a 🐕 and a 🐈", "一只狗在雪地里", "a\x00b\x07\u202e", "word " * 2000)


def png(value: int) -> bytes:
    """A picture of one grey, by which it is known again."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def load(place: Path, **options: Any) -> CaptionDataset:
    config = DataConfig(dataset=str(place), **options)
    assert check_dataset(config) == "captions"
    return load_captions(config, img_size=4, in_channels=1, progress=False)


def pairs(split: CaptionSplit) -> dict[int, tuple[str, ...]]:
    """Grey level -> captions."""
    return {int(split.images[n].max()): texts for n, texts in enumerate(split.captions)}


def greys(count: int, captions: int = 3) -> CaptionSplit:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return CaptionSplit(images, tuple(tuple(f"grey {n} number {k}" for k in range(captions)) for n in range(count)))


def batches(split: CaptionSplit, size: int = 4, **options: Any) -> CaptionBatches:
    return CaptionBatches(split, size, max_text_len=16, mean=[0.0], std=[1 / 255], **options)


def shown(batch: CaptionBatch) -> list[tuple[int, str]]:
    """(grey level, caption) of each picture of a batch."""
    greys = batch.images.amax((1, 2, 3)).round().int().tolist()
    return list(zip(greys, detokenize(batch.tokens), strict=True))


# --- Batches ---


def test_each_picture_comes_once_an_epoch_with_one_of_its_own_captions() -> None:
    for epoch in range(3):
        seen = [pair for batch in batches(greys(10), shuffle=True).epoch(epoch) for pair in shown(batch)]
        assert sorted(grey for grey, _ in seen) == list(range(10))
        assert all(text.startswith(f"grey {grey} number") for grey, text in seen)


def test_captions_are_drawn_anew_each_epoch_and_evenly() -> None:
    loader = batches(greys(40), 40, shuffle=True, seed=3)
    drawn = [dict(shown(next(iter(loader.epoch(epoch))))) for epoch in range(60)]
    assert drawn[0] != drawn[1]
    counts = Counter(text[-1] for of_epoch in drawn for text in of_epoch.values())
    assert all(700 < counts[str(k)] < 900 for k in range(3))  # 800 each, give or take 4 times sqrt(2400 * 2/9) = 23


def test_any_batch_of_any_epoch_can_be_made_again() -> None:
    loader = batches(greys(11), shuffle=True, seed=5)
    whole = list(loader.epoch(2))
    tail = list(batches(greys(11), shuffle=True, seed=5).epoch(2, start=1))
    assert len(tail) == len(whole) - 1
    for one, other in zip(whole[1:], tail, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_evaluation_keeps_the_order_and_takes_the_caption_of_the_epochs_number() -> None:
    loader = batches(greys(5))
    for epoch in (0, 1, 2, 3):
        seen = [pair for batch in loader.epoch(epoch) for pair in shown(batch)]
        assert seen == [(n, f"grey {n} number {epoch % 3}") for n in range(5)]


def test_ranks_share_a_batch_and_agree_on_its_captions() -> None:
    split = greys(12)
    whole = [sorted(shown(batch)) for batch in batches(split, shuffle=True).epoch(1)]
    ranks = [list(batches(split, shuffle=True, rank=r, world_size=2).epoch(1)) for r in range(2)]
    assert [sorted(shown(a) + shown(b)) for a, b in zip(*ranks, strict=True)] == whole


def test_a_batch_is_as_wide_as_its_longest_caption() -> None:
    split = CaptionSplit(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), (("a dog",), ("a dog runs on the grass",)))
    first, second = batches(split, 1).epoch()
    assert first.tokens.shape[1] == 4  # start, a, dog, end
    assert second.tokens.shape[1] == 8
    assert first.mask.all()
    assert second.mask.all()


def test_long_captions_are_cut_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    split = CaptionSplit(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), (("word " * 50,), ("short",), ("word " * 14,)))
    with caplog.at_level(logging.WARNING):
        loader = batches(split, 3, shuffle=True)
        batches(split, 3)  # evaluation says nothing
    assert [record.message for record in caplog.records] == [
        "2 of 3 training captions have 16 tokens or more and are cut there; a larger --max_text_len keeps more"
    ]
    batch = next(iter(loader.epoch()))
    assert batch.tokens.shape[1] == 16
    assert (batch.tokens == END_ID).sum(1).tolist() == [1, 1, 1]


def test_all_captions_know_their_picture_and_what_tokens_are_used() -> None:
    split = CaptionSplit(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), (("a dog", "a cat"), ("a dog runs",)))
    tokens, mask, image_of_text = caption_tokens(split, 16)
    assert detokenize(tokens) == ["a dog", "a cat", "a dog runs"]
    assert mask.sum(1).tolist() == [4, 4, 5]
    assert image_of_text.tolist() == [0, 0, 1]
    used = used_tokens(tokens, mask)
    assert used.tolist() == sorted(set(tokens[mask.bool()].tolist()) - {49406})
    assert END_ID in used


# --- Sources ---


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
        data = load(place)
        assert pairs(data.train) == {n: (f"grey {n}, number 0", f"grey {n}, number 1") for n in range(6)}
        assert (pairs(data.validation).keys(), pairs(data.test).keys()) == ({6, 7}, {8, 9})


def test_json_lines_without_splits_are_held_out_by_picture(folder: Path) -> None:
    rows = [{"image": f"pictures/{n}.png", "caption_0": f"a {n}", "caption_1": f"b {n}"} for n in range(10)]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load(folder, test_fraction=0.3, val_fraction=0.3)
    found = [pairs(split) for split in (data.train, data.validation, data.test)]
    assert [len(split) for split in found] == [5, 2, 3]
    assert {n: texts for split in found for n, texts in split.items()} == {n: (f"a {n}", f"b {n}") for n in range(10)}
    again = load(folder, test_fraction=0.3, val_fraction=0.3)
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
    data = load(folder)
    assert pairs(data.train) == {n: tuple(f"grey {n} number {k} ." for k in range(5)) for n in range(3)}
    assert (pairs(data.validation).keys(), pairs(data.test).keys()) == ({3}, {4})


def test_a_last_line_needs_no_line_end(folder: Path) -> None:
    splits = ["train"] * 8 + ["validation", "test"]
    table = [[f"pictures/{n}.png", f"grey {n}", splits[n]] for n in range(10)]
    for name in ("captions.csv", "captions.jsonl"):
        rows = [["image", "caption", "split"], *table]
        lines = [json.dumps(dict(zip(rows[0], row, strict=True))) for row in table]
        text = "\n".join(lines if name.endswith("l") else map(",".join, rows))
        (folder / name).write_text(text, encoding="utf-8-sig")
        assert pairs(load(folder).test) == {9: ("grey 9",)}
        (folder / name).unlink()
    flickr(folder)
    for path in folder.glob("*.txt"):
        path.write_text("\n\n" + path.read_text("utf-8").removesuffix("\n"), encoding="utf-8-sig")
    data = load(folder)
    assert pairs(data.train) == {n: tuple(f"grey {n} number {k} ." for k in range(5)) for n in range(3)}
    assert pairs(data.test) == {4: tuple(f"grey 4 number {k} ." for k in range(5))}
    (folder / "Flickr_8k.testImages.txt").write_text("\n4.jpg\n\n1.jpg", encoding="utf-8")
    with pytest.raises(UserError, match=r"testImages.txt line 4: 1.jpg is in train already"):
        load(folder)


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
        load(folder)


def test_flickr8k_without_a_picture_or_a_caption(folder: Path) -> None:
    flickr(folder)
    tokens = folder / "Flickr8k.token.txt"
    tokens.write_text(tokens.read_text("utf-8") + "9.jpg#0 no tab\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"token.txt line 26 has no caption: it must be 'name.jpg#0<tab>caption'"):
        load(folder)
    (folder / "Flicker8k_Dataset" / "1.jpg").unlink()
    tokens.write_text("".join(tokens.read_text("utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match=r"trainImages.txt line 2: there is no picture .*1.jpg"):
        load(folder)


def write_parquet(folder: Path, columns: dict[str, Any]) -> Path:
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
def test_parquet_columns_of_texts_or_of_lists(tmp_path: Path, columns: dict[str, Any], in_memory: bool) -> None:
    place = write_parquet(tmp_path / "set", columns)
    for _ in range(2):  # the second time from the cache
        data = load(place, max_memory_gb=4.0 if in_memory else 0.0)
        assert isinstance(data.train.images, LazyImages) != in_memory
        found = [pairs(split) for split in (data.train, data.validation, data.test)]
        assert {n: t for split in found for n, t in split.items()} == {n: (f"a {n}", f"b {n}") for n in range(8)}


def test_hard_texts_go_through(folder: Path) -> None:
    rows = [{"image": f"pictures/{n}.png", "caption": HARD[n % 4]} for n in range(10)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load(folder)
    assert {texts[0] for texts in data.train.captions} == set(HARD)
    for batch in batches(data.train, 4, shuffle=True).epoch():
        assert batch.tokens.shape[1] <= 16


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["image", "text"], ["pictures/0.png", "a"]], r"captions.csv line 2 has image, text: it must have image and"),
        ([["image", "caption"], ["pictures/0.png", " "]], r"captions.csv line 2 has an empty caption \(number 0\)"),
        ([["image", "caption"], ["pictures/0.png"]], r"captions.csv line 2 has image: it must have image and caption"),
        ([["image", "caption"], ["nowhere.png", "a"]], r"captions.csv line 2: there is no picture .*nowhere.png"),
        ([["image", "caption"], ["pictures/0.png", "a", "b"]], r"line 2 has more cells than the head: quote captions"),
        ([["image", "caption", "split"], ["pictures/0.png", "a", "dev"]], r"line 2 has the split 'dev': it must be"),
        (
            [["image", "caption", "split"], ["pictures/0.png", "a", "train"], ["pictures/0.png", "b", "test"]],
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
        load(folder)


def test_files_that_will_not_do(folder: Path, tmp_path: Path) -> None:
    (folder / "captions.csv").write_bytes(b"image,caption\npictures/0.png,caf\xe9\n")
    with pytest.raises(UserError, match=r"captions.csv line 2 is not UTF-8: save the file as UTF-8"):
        load(folder)
    (folder / "captions.csv").rename(folder / "one.csv")
    (folder / "two.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match=r"holds 2 tables: name the one with the captions captions.csv or .jsonl"):
        load(folder)
    (folder / "one.csv").unlink()
    with pytest.raises(UserError, match=r"two.jsonl line 1 is not valid JSON"):
        load(folder)
    (folder / "two.jsonl").write_text('["a"]\n')
    with pytest.raises(UserError, match=r"two.jsonl line 1 must be an object such as"):
        load(folder)
    for caption, message in (
        ([["a"], None], r"two.jsonl line 1 has the caption \['a'\] \(number 0\): it must be text"),
        (["a", None], r"two.jsonl line 1 has an empty caption \(number 1\)"),
        ({"raw": "a"}, r"two.jsonl line 1 has the caption {'raw': 'a'} \(number 0\): it must be text"),
    ):
        (folder / "two.jsonl").write_text(json.dumps({"image": "pictures/0.png", "caption": caption}))
        with pytest.raises(UserError, match=message):
            load(folder)
    (folder / "captions.jsonl").write_text("")
    (folder / "captions.csv").write_text("")
    with pytest.raises(UserError, match=r"holds 2 tables"):
        load(folder)
    for columns, message in (
        ({"caption": [1, 2]}, r"train-0.parquet row 0 has the caption 1 \(number 0\): it must be text"),
        ({"caption_0": ["a", None]}, r"train-0.parquet row 1 has an empty caption \(number 0\)"),
        ({"captions": [["a"], []]}, r"train-0.parquet row 1 has no caption: a picture must have at least one"),
    ):
        with pytest.raises(UserError, match=message):
            load(write_parquet(tmp_path / "table", columns))


def test_each_loader_takes_its_own_kind_of_set() -> None:
    with pytest.raises(UserError, match="dataset 'digits' is for classification: captions needs"):
        load_captions(DataConfig(dataset="digits"), img_size=8, in_channels=1)
    with pytest.raises(UserError, match="dataset 'shapes' is for captions: classification needs"):
        load_dataset(DataConfig(dataset="shapes"), img_size=8, in_channels=1)


def test_a_split_of_other_lengths_is_a_bug() -> None:
    with pytest.raises(ValueError, match="3 pictures but captions of 2"):
        CaptionSplit(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), (("a",), ("b",)))
