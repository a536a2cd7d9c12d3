"""A set of one's own that is called like a built-in one is read, and is not taken for it; no setting is lost unsaid."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffmoe.commands.classification import class_tokens, prepare
from diffmoe.config import DataConfig, UserError
from diffmoe.data import CaptionDataset, ImageDataset, check_dataset, load_captions, load_dataset
from diffmoe.hardware import make_fabric
from diffmoe.settings import parse_settings

SIZE: dict[str, Any] = {"img_size": 8, "in_channels": 3, "progress": True}
SMALL = ("--preset", "tiny", "--img_size", "8", "--patch_size", "4", "--device", "cpu", "--batch_size", "4")


def pictures(folder: Path, count: int = 10) -> list[str]:
    folder.mkdir(parents=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (number * 20, 90, 30)).save(folder / name)
    return names


def labelled(folder: Path, *classes: str) -> Path:
    for name in classes:
        pictures(folder / "train" / name)
    return folder


def captioned(folder: Path, file: str = "captions.csv", word: str = "w") -> Path:
    names = [path.name for path in folder.glob("*.png")] or pictures(folder)
    (folder / file).write_text("\n".join(["image,caption", *(f"{name},{word} {name}" for name in names)]))
    return folder


def load(dataset: str, data_dir: Path | None = None, **options: Any) -> ImageDataset | CaptionDataset:
    config = DataConfig(dataset=dataset, data_dir=None if data_dir is None else str(data_dir), **options)
    return (load_captions if check_dataset(config) == "captions" else load_dataset)(config, **SIZE)


@pytest.mark.parametrize("name", ["digits", "shapes"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_folder_in_data_dir_wins(tmp_path: Path, name: str, inside: bool) -> None:
    """Of either task, whichever the built-in one has; `data_dir` may hold the set, or be it."""
    data_dir = tmp_path / "sets"
    labelled(data_dir / name if inside else data_dir, "one", "two")
    data = load(name, data_dir)
    assert isinstance(data, ImageDataset)
    assert (data.name, data.known_as, data.class_names) == (name, "", ("one", "two"))
    assert len(data.train) + len(data.validation) + len(data.test) == 20

    data_dir = tmp_path / "more"
    captioned(data_dir / name if inside else data_dir)
    data = load(name, data_dir)
    assert isinstance(data, CaptionDataset)
    assert (data.name, data.known_as, data.train.held_out) == (name, "", None)


def test_a_path_is_no_built_in_set_whatever_it_ends_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path / "shapes")
    data = load("./shapes")
    assert isinstance(data, CaptionDataset)
    assert (data.name, data.known_as) == ("shapes", "")


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


def test_what_is_known_of_a_built_in_set_is_not_said_of_ones_own(tmp_path: Path) -> None:
    """Classes 0 and 1 of photographs are not described as handwritten digits; nor are they shrunk to their size."""
    labelled(tmp_path / "digits", "0", "1")
    fabric = make_fabric(parse_settings(SMALL, mode="train").run)
    for flags, known in (((), "digits"), (("--data_dir", str(tmp_path)), "")):
        settings = parse_settings([*SMALL, "--dataset", "digits", *flags], mode="train")
        model: Any = prepare(settings, fabric).model
        names = tuple("0123456789") if known else ("0", "1")
        expected, _ = class_tokens(known, names, settings.model.max_text_len)
        assert torch.equal(model.class_tokens, expected)
    own = parse_settings(["--dataset", "digits", "--data_dir", str(tmp_path)], mode="train")
    assert own.model == parse_settings(["--dataset", "owner/pets"], mode="train").model


def test_a_folder_here_that_is_not_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # of some other use
    assert len(load("digits").train) > 1000
    assert caplog.messages == []
    labelled(tmp_path / "digits", "one", "two")
    assert load("digits").known_as == "digits"
    assert caplog.messages == [
        "digits is the set that the program brings; --dataset ./digits reads the folder digits here"
    ]


def test_a_set_that_is_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(tmp_path / "a" / "pets", "one", "two")
    labelled(tmp_path / "b" / "pets", "cat", "dog")
    monkeypatch.chdir(tmp_path)
    for name in ("./a/pets", "a/pets", str(tmp_path / "a" / "pets")):
        with pytest.raises(
            UserError, match=r"dataset is '.*a/pets', which is there, and data_dir holds 'b/pets': give one"
        ):
            load(name, Path("b"))
        assert getattr(load(name, Path("a")), "class_names", ()) == ("one", "two")  # the same
    assert getattr(load("owner/pets", Path("b")), "class_names", ()) == ("cat", "dog")


def test_a_table_in_data_dir_is_the_one_that_is_named(tmp_path: Path) -> None:
    captioned(tmp_path / "set", "captions.csv", "first")
    captioned(tmp_path / "set", "more.csv", "second")
    data = load("more.csv", tmp_path / "set")
    assert isinstance(data, CaptionDataset)
    assert {text.split()[0] for (text,) in data.train.captions} == {"second"}


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
        load(str(folder), **given)
        assert [line.split(" is ")[0] for line in caplog.messages] == told
    assert f"val_fraction is 0.3 and changes nothing: {folder} has a validation split of its own" in caplog.messages
    caplog.clear()
    load(str(folder))
    load(str(folder), max_memory_gb=0.0, num_workers=1, split_seed=3)
    assert caplog.messages == []
    load("digits", max_memory_gb=1.0, test_fraction=0.3)
    assert caplog.messages == ["max_memory_gb is 1.0 and changes nothing: digits is always held in memory"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
