"""Several sets as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from diffmoe.config import DataConfig, UserError, dataset_name
from diffmoe.config.settings import parse_settings
from diffmoe.data.loading import load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.sources import check_dataset

SPEC = PictureSpec(16, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`two` with 12 pictures of 2 classes, `three` with 36 of 3; grey and in colour."""
    for name, classes, each, mode in (("two", ("cat", "dog"), 6, "L"), ("three", ("cat", "hat", "mat"), 12, "RGB")):
        for split in ("train", "test"):
            for label, class_name in enumerate(classes):
                for number in range(each):
                    path = tmp_path / name / split / class_name / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shade = 20 * number + 5 * label + (2 if split == "test" else 0)
                    Image.new(mode, (20, 20), shade if mode == "L" else (shade, 90, 30)).save(path)
    return tmp_path


def config(folder: Path, dataset: str = "two+three", **fields: object) -> DataConfig:
    return DataConfig(dataset=dataset, data_dir=str(folder), **fields)  # type: ignore[arg-type]


def test_the_whole_is_its_parts_one_after_the_other(folder: Path) -> None:
    data = load_dataset(config(folder), SPEC, progress=False)
    two, three = (load_dataset(config(folder, name), SPEC, progress=False) for name in ("two", "three"))
    assert data.name == "two+three"
    assert data.class_names == ("two: cat", "two: dog", "three: cat", "three: hat", "three: mat")
    for split in ("train", "validation", "test"):
        whole, first, second = (getattr(of, split) for of in (data, two, three))
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))
        assert torch.equal(whole.labels, torch.cat([first.labels, second.labels + 2]))
    assert whole.images.shape[1:] == (3, 16, 16)
    assert [part.name for part in data.parts] == ["two", "three"]


def test_equal_mixing_repeats_the_smaller_set_in_training_only(folder: Path) -> None:
    data = load_dataset(config(folder, set_mixing="equal"), SPEC, progress=False)
    own = (data.train.labels < 2).sum().item()
    assert own == 3 * 10  # 10 of 12 are left to train on, 31 or so of 36 are the other's
    assert (data.test.labels < 2).sum() == 12


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("two+two", "names 'two' twice"), ("two+shapes", "'shapes' has captions"), ("two+thre", "did you mean")],
)
def test_what_does_not_go_together_is_one_line(folder: Path, dataset: str, message: str) -> None:
    for name in ("shapes",):
        (folder / name).mkdir()
        Image.new("RGB", (8, 8)).save(folder / name / "a.png")
        (folder / name / "captions.csv").write_text("image,caption\na.png,a\n")
    with pytest.raises(UserError, match=message) as error:
        check_dataset(config(folder, dataset))
    assert "\n" not in str(error.value)


def test_a_name_with_a_plus_in_it_is_one_set_where_there_is_such_a_folder(folder: Path) -> None:
    (folder / "two").rename(folder / "c+d")
    assert load_dataset(config(folder, "c+d"), SPEC, progress=False).class_names == ("cat", "dog")
    assert dataset_name("a+b") == "a+b" == dataset_name("some/a+where/b")
    own = parse_settings(["--dataset", "c+d", "--data_dir", str(folder)], mode="train")
    several = parse_settings(["--dataset", "c+e", "--data_dir", str(folder)], mode="train")
    assert (own.model.img_size, several.model.img_size) == (64, 32)  # configs/folder.yaml, configs/several.yaml


def test_a_set_too_large_for_memory_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="max_memory_gb"):
        load_dataset(config(folder, max_memory_gb=0.0), SPEC, progress=False)
