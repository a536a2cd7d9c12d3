"""`diffmoe retrieve`: both ways through an index that is kept, and answers for no other gallery."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe import load_model
from diffmoe.config import DataConfig
from diffmoe.data.loading import load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.storage.index import Index
from diffmoe.storage.model_files import load_model_file

Cli = Callable[..., Any]


def test_a_text_finds_pictures_and_the_index_is_reused(captioned: Any, cli: Cli, tmp_path: Path) -> None:
    flags = ("--checkpoint", captioned.model, "--output_dir", tmp_path, "--device", "cpu", "--json")
    first = cli("retrieve", captioned.folder, "--text", "a red circle", *flags, "--top", "3")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert len(found["results"]) == 3
    assert Path(found["picture"]).is_file()
    index = Path(found["index"])
    made = index.stat().st_mtime_ns
    again = json.loads(cli("retrieve", captioned.folder, "--text", "a red circle", *flags, "--top", "3").out)
    for row, former in zip(again.pop("results"), found.pop("results"), strict=True):
        # The product's last digit depends on where in memory the embeddings came to lie.
        assert row == {"item": former["item"], "similarity": pytest.approx(former["similarity"], abs=1e-6)}
    assert again == found
    assert index.stat().st_mtime_ns == made


def test_an_index_of_another_gallery_is_named_and_kept(captioned: Any, cli: Cli, tmp_path: Path) -> None:
    flags = ("--checkpoint", captioned.model, "--output_dir", tmp_path, "--device", "cpu", "--text", "a red circle")
    index = tmp_path / "kept.safetensors"
    assert cli("retrieve", captioned.folder, *flags, "--index", index).code == 0
    content = index.read_bytes()
    other = tmp_path / "galleries" / "other"
    other.mkdir(parents=True)
    (other / "0.png").write_bytes(captioned.pictures[0].read_bytes())
    result = cli("retrieve", other, *flags, "--index", index)
    assert result.code == 2
    assert str(index) in result.err
    assert index.read_bytes() == content
    assert cli("retrieve", other, *flags, "--index", index, "--overwrite").code == 0


def test_a_picture_finds_texts(captioned: Any, cli: Cli, tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\ufeffa red circle\n\na blue\u2028square\n一只狗", encoding="utf-8")
    flags = ("--checkpoint", captioned.model, "--output_dir", tmp_path / "out", "--device", "cpu", "--json")
    result = cli("retrieve", captioned.folder, "--image", captioned.pictures[0], "--sentences", sentences, *flags)
    assert result.code == 0, result.err
    found = json.loads(result.out)["results"]
    assert {row["item"] for row in found} == {"a red circle", "a blue\u2028square", "一只狗"}
    assert [row["similarity"] for row in found] == sorted((row["similarity"] for row in found), reverse=True)


@pytest.mark.parametrize(("split", "count"), [("test", 1258), ("validation", 270), ("train", 269)])
def test_a_dataset_is_split_as_for_the_models_training(
    trained: Any, cli: Cli, tmp_path: Path, split: str, count: int
) -> None:
    """Of 1,797 digits 0.7 were held out for testing, and half of the rest for validation: not the default shares."""
    flags = ("--checkpoint", trained.model, "--output_dir", tmp_path, "--device", "cpu", "--json")
    result = cli("retrieve", "digits", "--text", "the number one", "--split", split, *flags)
    assert result.code == 0, result.err
    index = Index.load(Path(json.loads(result.out)["index"]))
    assert index.items == tuple(f"digits {split} {row}" for row in range(count))
    model, info = load_model(trained.model), load_model_file(trained.model).data
    data = load_dataset(DataConfig(test_fraction=0.7, val_fraction=0.5), PictureSpec(8, 1))
    pictures = PictureSpec(8, 1, info.mean, info.std).normalize(getattr(data, split).images[:5])
    with torch.inference_mode():
        torch.testing.assert_close(index.embeddings[:5], model.backbone.encode_image(pictures), rtol=0, atol=1e-5)


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN"])
def test_a_folder_with_splits_is_a_set_however_they_are_spelt(
    trained: Any, cli: Cli, flowers: Path, tmp_path: Path, train: str
) -> None:
    """Its test split is searched, as the trainer reads it: not all that lies in the folder."""
    (flowers / "train").rename(flowers / train)
    flags = ("--checkpoint", trained.model, "--output_dir", tmp_path / "out", "--device", "cpu", "--json")
    result = cli("retrieve", flowers, "--image", flowers / train / "rose" / "0.png", *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "this gallery has no captions" in result.err
    found = json.loads(cli("retrieve", flowers, "--text", "a rose", *flags, "--top", 99).out)["results"]
    assert {row["item"] for row in found} == {f"flowers test {number}" for number in range(16)}  # 0.7 of 24, by class


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{folder}",), "retrieve needs either --text, which asks for pictures, or --image"),
        (("{folder}", "--text", "a", "--image", "{picture}"), "retrieve needs either --text, which asks for pictures"),
        (("{folder}", "--text", "a", "--top", "0"), "top is 0: it must be at least 1"),
        (("{folder}", "--text", "a", "--split", "tset"), "split is 'tset': it must be train, validation or test"),
        (("{folder}", "--image", "nowhere.png"), "nowhere.png"),
        (("{folder}", "--image", "{picture}", "--sentences", "nowhere.txt"), "nowhere.txt"),
        (("nowhere", "--text", "a"), "dataset is 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line(
    captioned: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"{picture}": captioned.pictures[0], "{folder}": captioned.folder}
    result = cli("retrieve", *(names.get(word, word) for word in words), "--checkpoint", captioned.model)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert list(tmp_path.iterdir()) == []
