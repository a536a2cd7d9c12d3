"""A set made ready: digits, one's own sets, what is said of settings, the fingerprint that tells a set from others."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.samples import captioned, labelled, load, pictures, pixels
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.config.settings import parse_settings
from diffmoe.data.descriptions import class_descriptions
from diffmoe.data.loading import FINGERPRINT_SAMPLE, Dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.splits import Split
from diffmoe.model.heads import ImageClassifier


def test_importing_the_package_is_light() -> None:
    heavy = ("datasets", "pyarrow", "sklearn", "open_clip", "torchvision", "tokenizers", "safetensors")
    code = (
        "import importlib, pkgutil, sys, diffmoe.data\n"
        "modules = [module.name for module in pkgutil.iter_modules(diffmoe.data.__path__, 'diffmoe.data.')]\n"
        "[importlib.import_module(name) for name in modules]\n"
        f"print('diffmoe.data.loading' in modules, [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


# --- Digits ---


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    data = load("digits", 8, 1)
    expected = torch.from_numpy(load_digits(return_X_y=True)[0])
    everything = torch.cat([pixels(split) for split in (data.train, data.validation, data.test)])
    assert everything.shape == (1797, 1, 8, 8)
    assert everything.max() == 255
    back = (everything[:, 0].double() * 16 / 255).round()
    assert sorted(back.flatten(1).tolist()) == sorted(expected.tolist())


def test_digits_of_another_size_and_in_colour() -> None:
    data = load("digits", 12, 3)
    assert pixels(data.train).shape[1:] == (3, 12, 12)
    assert (pixels(data.train)[:, :1] == pixels(data.train)).all()
    assert (data.picture.size, data.picture.channels) == (12, 3)
    assert len(data.picture.mean) == len(data.picture.std) == 3


def test_splits_are_stratified_and_depend_on_split_seed_alone() -> None:
    data, again, other = (load("digits", 8, 1, split_seed=seed) for seed in (0, 0, 1))
    for split in (data.train, data.validation, data.test):
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert (shares - 0.1).abs().max() < 0.012
    assert torch.equal(pixels(data.test), pixels(again.test))
    assert not torch.equal(pixels(data.test)[:100], pixels(other.test)[:100])


def test_the_summary_counts_pictures_and_what_is_said_of_them(tmp_path: Path) -> None:
    assert load("digits", 8, 1).summary() == "digits: 1,295 training, 143 validation, 359 test pictures; 10 classes"
    captions = load(captioned(tmp_path / "w")).summary()
    assert captions == "w: 7 training, 1 validation, 2 test pictures; 7 training captions"


# --- Sets of one's own ---


def test_check_lists_all_that_cannot_be_read_with_what_is_wrong(tmp_path: Path, caplog: Any) -> None:
    labelled(tmp_path / "pets", "cat", "dog")
    pictures_of = sorted((tmp_path / "pets").rglob("*.png"))
    assert load("pets", data_dir=str(tmp_path), check=True).summary() == load("pets", data_dir=str(tmp_path)).summary()
    for path in pictures_of[:2]:
        path.write_bytes(b"no picture")
    half = pictures_of[-1]
    half.write_bytes(half.read_bytes()[:50])  # the head and no more
    with pytest.raises(UserError, match=f"3 of {len(pictures_of)} pictures cannot be read: replace or remove them"):
        load("pets", data_dir=str(tmp_path), check=True)
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("2 pictures: is not a picture: it must be")
    assert [line.strip() for line in told[1:3]] == [str(path) for path in pictures_of[:2]]
    assert told[3].startswith("1 picture: ")
    assert told[4].strip() == str(half)
    assert len(told) == 5


@pytest.mark.parametrize("name", ["digits", "shapes"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_folder_in_data_dir_wins(tmp_path: Path, name: str, inside: bool) -> None:
    """Of either task, whichever the built-in one has; `data_dir` may hold the set, or be it."""
    data_dir = tmp_path / "sets"
    labelled(data_dir / name if inside else data_dir, "one", "two")
    data = load(name, data_dir=str(data_dir))
    assert (data.name, data.known_as, data.class_names) == (name, "", ("one", "two"))
    assert len(data.train) + len(data.validation) + len(data.test) == 20

    data_dir = tmp_path / "more"
    captioned(data_dir / name if inside else data_dir)
    data = load(name, data_dir=str(data_dir))
    assert (data.name, data.known_as, data.class_names, data.train.held_out) == (name, "", (), None)


def test_a_path_is_no_built_in_set_whatever_it_ends_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path / "shapes")
    data = load("./shapes")
    assert (data.name, data.known_as, len(data.train.texts)) == ("shapes", "", 7)


def test_what_is_known_of_a_built_in_set_is_not_said_of_ones_own(tmp_path: Path) -> None:
    """Classes 0 and 1 of photographs are not described as handwritten digits; nor are they shrunk to their size."""
    from diffmoe.tasks.classification import Classification, class_tokens

    labelled(tmp_path / "digits", "0", "1")
    small = ("--preset", "tiny", "--img_size", "8", "--patch_size", "4", "--dataset", "digits")
    for data_dir, known in ((None, "digits"), (str(tmp_path), "")):
        settings = parse_settings([*small, *(("--data_dir", data_dir) if data_dir else ())], mode="train")
        model = Classification().build(settings, load("digits", 8, 1, data_dir=data_dir))
        names = tuple("0123456789") if known else ("0", "1")
        expected, _ = class_tokens(class_descriptions(known, names), settings.model.max_text_len)
        assert isinstance(model, ImageClassifier)
        assert model.class_tokens is not None
        assert torch.equal(model.class_tokens, expected)
    own = parse_settings(["--dataset", "digits", "--data_dir", str(tmp_path)], mode="train")
    assert own.model == parse_settings(["--dataset", "owner/pets"], mode="train").model


def test_a_folder_here_that_is_not_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # of some other use
    assert len(load("digits", progress=True).train) > 1000
    assert caplog.messages == []
    labelled(tmp_path / "digits", "one", "two")
    assert load("digits", progress=True).known_as == "digits"
    assert caplog.messages == [
        "digits is the set that the program brings; --dataset ./digits reads the folder digits here"
    ]
    load("digits")  # a process that shows no progress, such as the second of two
    assert len(caplog.messages) == 1


def test_settings_that_change_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"val_fraction": 0.3, "test_fraction": 0.3, "split_seed": 3, "num_workers": 1}
    folder = labelled(tmp_path / "pets", "one", "two")
    for split, told in (
        ("", ["num_workers"]),
        ("test", ["test_fraction", "num_workers"]),
        ("val", ["val_fraction", "test_fraction", "num_workers", "split_seed"]),
    ):
        if split:
            pictures(folder / split / "one")
        caplog.clear()
        load(folder, progress=True, **given)
        assert [line.split(" is ")[0] for line in caplog.messages] == told
    assert f"val_fraction is 0.3 and changes nothing: {folder} has a validation split of its own" in caplog.messages
    caplog.clear()
    load(folder, progress=True)
    load(folder, progress=True, max_memory_gb=0.0, num_workers=1, split_seed=3)
    assert caplog.messages == []
    load("digits", progress=True, max_memory_gb=1.0, test_fraction=0.3)
    assert caplog.messages == ["max_memory_gb is 1.0 and changes nothing: digits is always held in memory"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


# --- The fingerprint ---


def repaint(path: Path) -> None:
    """One pixel of the picture, by one level."""
    image = np.array(Image.open(path))
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(path)


def fingerprint(folder: Path, **options: Any) -> str:
    return load(folder, **options).fingerprint()


def test_a_set_that_was_copied_is_the_same(picture_folder: Path, tmp_path: Path) -> None:
    """Elsewhere, under another name, its files of another time; held in memory or not, as often as it is asked."""
    before = fingerprint(picture_folder)
    shutil.copytree(picture_folder, tmp_path / "elsewhere/animals", copy_function=shutil.copyfile)
    copied = sorted((tmp_path / "elsewhere/animals").rglob("*.png"))
    for number, path in enumerate(copied):
        os.utime(path, (number, number))
    assert fingerprint(tmp_path / "elsewhere/animals") == before
    assert fingerprint(picture_folder, max_memory_gb=0.0) == before
    assert fingerprint(picture_folder) == before
    table = captioned(tmp_path / "set")
    shutil.copytree(table, tmp_path / "copy", copy_function=shutil.copyfile)
    assert fingerprint(tmp_path / "copy") == fingerprint(table) != before


def rename_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "hound")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a class renamed": rename_class,
    "a training picture removed": lambda root: (root / "train/dog/03.png").unlink(),
    "a test picture removed": lambda root: (root / "test/dog/03.png").unlink(),
    "a picture of another class": lambda root: (root / "train/dog/03.png").rename(root / "train/cat/99.png"),
    "a split of its own": lambda root: shutil.copytree(root / "test", root / "val"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_classes_labels_or_pictures_are_other_data(picture_folder: Path, change: str) -> None:
    before = fingerprint(picture_folder)
    CHANGES[change](picture_folder)
    assert fingerprint(picture_folder) != before


@pytest.mark.parametrize("max_memory_gb", [4.0, 0.0])
def test_one_pixel_of_a_sampled_picture_makes_other_data(picture_folder: Path, max_memory_gb: float) -> None:
    """With a validation split of its own all 30 training pictures are the set's: so few are all looked at."""
    shutil.copytree(picture_folder / "test", picture_folder / "val")
    options: dict[str, Any] = {"size": 12, "max_memory_gb": max_memory_gb}  # nothing is scaled down here
    before = fingerprint(picture_folder, **options)
    found = {before}
    for path in sorted((picture_folder / "train").rglob("*.png")):
        whole = path.read_bytes()
        repaint(path)
        found.add(fingerprint(picture_folder, **options))
        path.write_bytes(whole)
    assert len(found) == 1 + 30
    assert fingerprint(picture_folder, **options) == before


def test_of_many_pictures_a_sample_is_looked_at_and_every_label() -> None:
    """64 of 200, evenly spread from the first to the last."""
    images = torch.randint(0, 256, (200, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 2

    def fingerprint_of(images: Tensor, labels: Tensor) -> str:
        train, other = Split(images, labels), Split(images[:2] * 0, torch.tensor([0, 1]))
        return Dataset("s", "s", ("a", "b"), train, other, other, PictureSpec(2, 1)).fingerprint()

    before = fingerprint_of(images, labels)
    sampled = []
    for row in range(200):
        changed, relabelled = images.clone(), labels.clone()
        changed[row, 0, 1, 1] ^= 1
        relabelled[row] ^= 1
        sampled += [row] if fingerprint_of(changed, labels) != before else []
        assert fingerprint_of(images, relabelled) != before
    assert len(sampled) == FINGERPRINT_SAMPLE
    assert (sampled[0], sampled[-1]) == (0, 199)
    assert max(after - row for row, after in pairwise(sampled)) <= 4


def test_another_caption_makes_other_data(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "set")
    before = fingerprint(folder)
    text = (folder / "captions.csv").read_text()
    for number in range(10):  # whichever split the picture is in
        (folder / "captions.csv").write_text(text.replace(f"w {number}.png", f"v {number}.png"))
        assert fingerprint(folder) != before
    (folder / "captions.csv").write_text(text)
    assert fingerprint(folder) == before


def test_other_settings_of_the_split_make_other_data(picture_folder: Path) -> None:
    before = fingerprint(picture_folder)
    assert fingerprint(picture_folder, split_seed=1) != before
    assert fingerprint(picture_folder, val_fraction=0.4) != before
    assert fingerprint(picture_folder, size=6) != before
