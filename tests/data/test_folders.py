"""Class folders: what is read, what is ignored, and what a mistake in the layout says."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.data.samples import labelled, load, pictures, pixels

from diffmoe.config import DataConfig, UserError
from diffmoe.data.folders import picture_files
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.sources import check_dataset


def test_pictures_and_labels_belong_together(picture_folder: Path) -> None:
    data = load(picture_folder)
    assert (data.name, data.class_names) == ("pets", ("bird", "cat", "dog"))
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 12)
    paths = sorted((picture_folder / "test").rglob("*.png"))
    for index, path in enumerate(paths):
        assert data.class_names[data.test.labels[index]] == path.parent.name
        assert torch.equal(data.test.images[index], PictureSpec(8, 3).read(path))


def test_own_validation_split_is_taken_as_it_is(picture_folder: Path) -> None:
    shutil.copytree(picture_folder / "test", picture_folder / "val")
    data = load(picture_folder)
    assert len(data.train) == 30
    assert torch.equal(pixels(data.validation), pixels(data.test))


def test_class_folders_without_train_are_split_three_ways(picture_folder: Path) -> None:
    data = load(picture_folder / "train")
    assert (len(data.train), len(data.validation), len(data.test)) == (21, 3, 6)


def test_what_is_no_picture_is_ignored(picture_folder: Path) -> None:
    (picture_folder / "train/cat/notes.txt").write_text("no picture")
    (picture_folder / "train/cat/.hidden.png").write_text("no picture")
    (picture_folder / "train/.cache").mkdir()
    nested = picture_folder / "train/cat/more/deep"
    nested.mkdir(parents=True)
    Image.new("L", (3, 3)).save(nested / "UPPER.JPG", "JPEG")
    data = load(picture_folder)
    assert data.class_names == ("bird", "cat", "dog")
    assert len(data.train) + len(data.validation) == 31


@pytest.mark.parametrize("place", ["", "train", "train/cat"])
@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"])
def test_folders_that_systems_make_are_not_there(picture_folder: Path, place: str, name: str) -> None:
    expected = load(picture_folder).fingerprint()
    thumbnails = picture_folder / place / name / "03.png"
    thumbnails.mkdir(parents=True)
    Image.new("L", (3, 3)).save(thumbnails / "SYNOPHOTO_THUMB_M.jpg")
    Image.new("L", (3, 3)).save(thumbnails.parent / "._03.png")
    assert load(picture_folder).fingerprint() == expected
    assert len(picture_files(picture_folder)) == 42


UNREADABLE = """
import os, sys
from pathlib import Path
from diffmoe.config import UserError
from diffmoe.data.folders import FolderSource, picture_files
if os.getuid() == 0:  # who may read everything
    os.setgroups([])
    os.setuid(65534)
try:
    FolderSource.open(Path(sys.argv[1]))
except UserError as error:
    print(error)
try:
    picture_files(Path(sys.argv[1]))
except UserError as error:
    print(error)
print(len(picture_files(Path(sys.argv[1]), whole=False)))
"""


@pytest.mark.parametrize("mode", [0o000, 0o300])
@pytest.mark.parametrize(("folder", "others"), [("train", 10), ("train/cat", 20), ("train/cat/deep", 30), ("test", 30)])
def test_a_folder_that_cannot_be_looked_into_is_named(folder: str, others: int, mode: int) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as top:  # where others may go, unlike pytest's
        root = labelled(Path(top), "cat", "dog")
        for path in (root / "train/cat/deep", root / "test/cat"):
            pictures(path)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        (root / folder).chmod(mode)
        try:
            done = subprocess.run([sys.executable, "-c", UNREADABLE, top], capture_output=True, text=True, check=True)
        finally:
            (root / folder).chmod(0o755)
    refused = f"{root / folder}: Permission denied: make the folder readable or move it away\n"
    assert done.stdout == f"{refused}{refused}{others}\n"


def test_lazy_equals_in_memory(picture_folder: Path) -> None:
    memory, lazy = load(picture_folder), load(picture_folder, max_memory_gb=0)
    assert lazy.picture == memory.picture  # the sample for the statistics is the whole set here
    for name in ("train", "validation", "test"):
        a, b = getattr(memory, name), getattr(lazy, name)
        assert isinstance(b.images, LazyImages)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, pixels(b))


def test_a_damaged_picture_is_named_by_its_path(picture_folder: Path) -> None:
    path = picture_folder / "train/dog/03.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"train/dog/03\.png cannot be decoded"):
        load(picture_folder)


def test_mistakes_in_the_layout(picture_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(picture_folder, tmp_path / "whole")
    (picture_folder / "train/fish").mkdir()
    with pytest.raises(UserError, match="train/fish holds no pictures"):
        load(picture_folder)
    (picture_folder / "train/fish").rmdir()

    (picture_folder / "test/dog").rename(picture_folder / "test/dgo")
    with pytest.raises(UserError, match=r"test/dgo is a class that is not in .*train \(did you mean 'dog'\?\)"):
        load(picture_folder)

    (tmp_path / "flat/train").mkdir(parents=True)
    with pytest.raises(UserError, match="flat/train has no class folders"):
        load(tmp_path / "flat")

    shutil.copytree(tmp_path / "whole/test", tmp_path / "whole/val")
    shutil.copytree(tmp_path / "whole/test", tmp_path / "whole/validation")
    with pytest.raises(UserError, match=r"whole has both val and validation, which are one split: keep one of them"):
        load(tmp_path / "whole")

    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"nothing holds no dataset: it must hold train-\*\.parquet"):
        load(tmp_path / "nothing")


def test_a_class_too_small_to_split(picture_folder: Path) -> None:
    for path in sorted((picture_folder / "train/cat").iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match="class 'cat' has only 1 picture"):
        load(picture_folder)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/one"], r"set/train has only the class 'one': there must be 2 or more to tell apart, or captions"),
        (["Images"], r"set has only the class 'Images': there must be 2 or more"),
        (["Train", "Test"], r"pictures must be in .*set/[Tt]rain/<class>/"),
        (["val", "TEST"], r"set has the folders TEST, val, which are splits, not classes: .* in .*set/train/<class>/"),
        (["train/train", "train/test"], r"train has the folders test, train, which are .*must be in .*/train/<class>/"),
        (["train/train"], r"set/train has the folders train, which are splits, not classes"),
        (["train/train/one", "train/train/two"], r"holds nothing but .*/train/train: the classes are the folders in"),
    ],
)
def test_folders_that_are_no_classes_to_tell_apart(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        pictures(tmp_path / "set" / folder)
    with pytest.raises(UserError, match=message) as caught:
        check_dataset(DataConfig(dataset=str(tmp_path / "set")))
    assert "\n" not in str(caught.value)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load(labelled(tmp_path, "train", "car")).class_names == ("car", "train")


def test_splits_are_known_by_their_names_in_capitals_too(picture_folder: Path) -> None:
    expected = load(picture_folder).fingerprint()
    for name in ("train", "test"):
        (picture_folder / name).rename(picture_folder / name.title())
    assert load(picture_folder).fingerprint() == expected
    shutil.copytree(picture_folder / "Test", picture_folder / "VAL")
    assert len(load(picture_folder).train) == 30
    shutil.copytree(picture_folder / "Test", picture_folder / "test")
    with pytest.raises(UserError, match="has both Test and test, which are one split"):
        load(picture_folder)


def test_what_is_left_out_is_said(picture_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(picture_folder, progress=True)
    assert caplog.messages == []
    shutil.copytree(picture_folder / "test", picture_folder / "dev")
    (picture_folder / "notes").mkdir()
    shutil.copy(picture_folder / "train/cat/03.png", picture_folder / "train")
    for number in range(3):
        (picture_folder / f"train/cat/{number}.DNG").touch()
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        data = load(picture_folder, progress=True)
        assert (len(data.train) + len(data.validation), len(data.test)) == (30, 12)
        assert caplog.messages == [
            f"{picture_folder}/dev is not read, with its pictures (12): a split must be called train, validation, test",
            f"{picture_folder}/train has pictures beside its class folders (1), which are not read",
            f"{picture_folder}/train has .dng files (3), which are not read: convert them to .jpg or .png",
        ]


HEIC = """
import sys, types
if {installed}:
    heif = types.ModuleType("pillow_heif")
    heif.register_heif_opener = lambda: print("registered")
sys.modules["pillow_heif"] = heif if {installed} else None
from tests.data.samples import load
data = load({folder!r}, progress=True)
print(len(data.train) + len(data.validation), len(data.test))
"""


@pytest.mark.parametrize("installed", [True, False])
def test_heic_is_read_where_its_reader_is_installed_and_else_said(picture_folder: Path, installed: bool) -> None:
    for path in picture_folder.glob("train/*/0[0-4].png"):
        path.rename(path.with_suffix(".HEIC"))
    code = HEIC.format(folder=str(picture_folder), installed=installed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ("registered\n30 12\n" if installed else "15 12\n")
    said = "train has .heic files (15), which are not read: pip install 'diff-moe[heic]' reads them"
    assert (said in done.stderr) != installed


def test_a_class_of_nothing_but_heic_says_so(picture_folder: Path) -> None:
    for path in picture_folder.glob("train/cat/*"):
        path.rename(path.with_suffix(".dng"))
    with pytest.raises(UserError, match=r"train/cat holds no pictures but such as cat/0\d\.dng \(convert them to .jpg"):
        load(picture_folder)


@pytest.mark.parametrize("max_memory_gb", [4.0, 0.0])
def test_links_to_nowhere_are_one_line(picture_folder: Path, max_memory_gb: float) -> None:
    link = picture_folder / "train/cat/03.png"
    link.unlink()
    link.symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"train/cat/03\.png: No such file or directory: it must be a picture that can"):
        load(picture_folder, max_memory_gb=max_memory_gb)
    link.unlink()
    (picture_folder / "val").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"pets/val is a link to nowhere, which is not there: mend or remove it"):
        load(picture_folder, max_memory_gb=max_memory_gb)


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../../train/dog"])
def test_each_folder_is_visited_once_wherever_links_lead(picture_folder: Path, target: str) -> None:
    (picture_folder / "train/cat/link").symlink_to(target)
    data = load(picture_folder)
    assert len(data.train) + len(data.validation) == 30
    assert torch.bincount(torch.cat([data.train.labels, data.validation.labels])).tolist() == [10, 10, 10]
    assert len(picture_files(picture_folder)) == 42


def test_links_among_the_class_folders(picture_folder: Path) -> None:
    elsewhere = (picture_folder / "train/cat").rename(picture_folder.parent / "cats")
    (picture_folder / "train/cat").symlink_to(elsewhere)
    (picture_folder / "train/up").symlink_to("..")
    assert load(picture_folder).class_names == ("bird", "cat", "dog")
    (picture_folder / "train/kitten").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"train has links from one class to another: each must have a folder of its"):
        load(picture_folder)
