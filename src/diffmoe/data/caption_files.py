"""Captioned pictures that are files: a table of captions (CSV, TSV, JSON Lines), or Flickr8k, original or Kaggle's."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from diffmoe.config import UserError
from diffmoe.data.captions import CaptionSplit, captions_in, check_captions
from diffmoe.data.folders import FilePictures, has_train_classes, picture_folders
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.splits import ClassesAndSplits, split_of
from diffmoe.data.tables import caption_columns
from diffmoe.data.text_files import read_csv, read_json_lines, read_lines

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
FLICKR_TOKENS = "Flickr8k.token.txt"
FLICKR_TABLE = "captions.txt"
"""Of Kaggle's copy: a CSV table, its pictures in a folder beside it."""
FLICKR_LISTS = {"train": "trainImages", "validation": "devImages", "test": "testImages"}
FLICKR_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images")
"""Of the original distribution (its spelling), and of a common copy."""


@dataclass(frozen=True)
class CaptionFiles:
    """A set whose pictures are files; `captions` are, for each split, those of each picture by its name."""

    root: Path
    """The folder that the names are relative to."""
    captions: dict[str, dict[str, tuple[str, ...]]]
    has_captions = True

    def __len__(self) -> int:
        return sum(map(len, self.captions.values()))

    def left_out(self) -> tuple[()]:
        """Nothing: a picture without a row in the table may well be meant for something else."""
        return ()

    def fingerprint(self) -> str:
        """Changes with the captions, and when a picture is written (its size or time)."""
        digest = hashlib.sha256(json.dumps(self.captions).encode())
        for name in itertools.chain(*self.captions.values()):
            status = (self.root / name).stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:32]

    def read(self, picture: PictureSpec, in_memory: bool) -> ClassesAndSplits:
        """No class names, and for each split its pictures and their captions; the files stay on disk either way."""
        return (), {
            split: CaptionSplit(LazyImages.of(FilePictures(self.root, tuple(names)), picture), tuple(names.values()))
            for split, names in self.captions.items()
        }


def find_caption_files(place: Path) -> CaptionFiles | None:
    """The set in a folder or a table file; None where it is not laid out as one. Reads no picture.

    Raises `UserError` naming the file and line where a caption, a picture or a column is missing.
    """
    if place.is_file():
        return _read_table(place) if has_table_suffix(place) else None
    if (place / FLICKR_TOKENS).is_file():
        return _read_flickr(place)
    tables = _tables(place)
    if len(tables) > 1:
        raise UserError(
            f"{place} holds {len(tables)} tables: name the one with the captions captions.csv, .tsv or .jsonl"
        )
    return _read_table(tables[0]) if tables else None


def has_caption_files(folder: Path) -> bool:
    """Whether `find_caption_files` has something to read there; reads nothing."""
    return (folder / FLICKR_TOKENS).is_file() or bool(_tables(folder))


def has_table_suffix(path: Path) -> bool:
    """Whether a file is a captions table by its name."""
    return path.suffix.lower() in TABLE_SUFFIXES or path.name == FLICKR_TABLE


def _tables(folder: Path) -> list[Path]:
    """The tables that may hold captions: those named so; beside class folders no table of labels or the like."""
    tables = [path for path in sorted(folder.glob("*")) if has_table_suffix(path)]
    tables = [path for path in tables if path.name != FLICKR_TABLE or _has_columns(path)]
    if not tables:
        return []
    if named := [path for path in tables if path.stem == "captions"]:
        return named
    if has_train_classes(folder):
        return []
    return [path for path in tables if _has_columns(path)] if len(picture_folders(folder)) > 1 else tables


def _has_columns(path: Path) -> bool:
    """Whether the first line of a table names the columns of captions."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        names = re.findall(r"\w+", file.readline())
    return "image" in names and bool(caption_columns(names))


def _read_table(path: Path) -> CaptionFiles:
    """`image` and `caption...` columns, a row or several for each picture, and, if there is one, `split`."""
    rows = read_json_lines(path) if path.suffix.lower() == ".jsonl" else read_csv(path, "image")
    root = path.parent
    if path.name == FLICKR_TABLE:
        root = next(iter(_flickr_folders(root)), root)
    captions: dict[str, dict[str, tuple[str, ...]]] = {}
    split_of: dict[str, str] = {}
    for number, row in rows:
        where = f"{path} line {number}"
        texts = captions_in(row[name] for name in caption_columns(row))
        if "image" not in row or not caption_columns(row):
            raise UserError(
                f"{where} has {', '.join(row)}: it must have image and caption, or caption_0, caption_1, ..."
            )
        name, split = _picture_name(root, row["image"], where), _split_name(str(row.get("split") or "train"), where)
        check_captions([texts], lambda _, where=where: where)
        if split_of.setdefault(name, split) != split:
            raise UserError(f"{where} puts {name} in {split}, but it is in {split_of[name]} already: choose one")
        if not os.path.isfile(root / name):  # Path's own raises on a name that is too long
            raise UserError(f"{where}: there is no picture {root / name}")
        of_split = captions.setdefault(split, {})
        of_split[name] = (*of_split.get(name, ()), *texts)
    if "train" not in captions:
        raise UserError(
            f"{path} has no pictures to train on: it must hold rows, of the split train where it has splits"
        )
    return CaptionFiles(root, captions)


def _picture_name(root: Path, cell: object, where: str) -> str:
    """One name for `a.png` and `./a.png`, and with slashes where Windows wrote `b\\a.png`. Raises `UserError`."""
    name = str(cell)
    if cell is None or not name.strip():
        raise UserError(f"{where} names no picture: write the path of one under image, or remove the row")
    if "\\" in name and not os.path.isfile(root / name):
        name = name.replace("\\", "/")
    return str(Path(name))


def _split_name(name: str, where: str) -> str:
    if split := split_of(name):
        return split
    raise UserError(f"{where} has the split {name!r}: it must be train, validation or test")


def _flickr_folders(root: Path) -> list[Path]:
    return [folder for name in FLICKR_FOLDERS if (folder := root / name).is_dir()]


def _read_flickr(root: Path) -> CaptionFiles:
    folders = _flickr_folders(root)
    if not folders:
        raise UserError(f"{root} has {FLICKR_TOKENS} but no {' or '.join(FLICKR_FOLDERS)}: the pictures must be there")
    captions: dict[str, list[str]] = {}
    for number, line in read_lines(root / FLICKR_TOKENS):
        name, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise UserError(f"{root / FLICKR_TOKENS} line {number} has no caption: it must be 'name.jpg#0<tab>caption'")
        captions.setdefault(name.partition("#")[0], []).append(text.strip())
    splits: dict[str, dict[str, tuple[str, ...]]] = {}
    seen: dict[str, str] = {}
    for split, part in FLICKR_LISTS.items():
        path = root / f"Flickr_8k.{part}.txt"
        splits[split] = {}
        for number, line in read_lines(path):
            name = line.strip()
            if name not in captions:
                raise UserError(f"{path} line {number}: {name} has no caption in {FLICKR_TOKENS}")
            if name in seen:
                raise UserError(f"{path} line {number}: {name} is in {seen[name]} already: choose one")
            if not os.path.isfile(folders[0] / name):
                raise UserError(f"{path} line {number}: there is no picture {folders[0] / name}")
            seen[name] = split
            splits[split][name] = tuple(captions[name])
    return CaptionFiles(folders[0], splits)
