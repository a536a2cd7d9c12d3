"""The task of captions, end to end on a small folder: train, test, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe import Captioner, load_model
from diffmoe.config import DataConfig
from diffmoe.data import shapes
from diffmoe.data.loading import load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.evaluation.retrieval import retrieval_metrics
from diffmoe.tasks import captioning
from diffmoe.tasks.captioning import SHEET, captions_as_text, is_captions_file

Cli = Callable[..., Any]


def test_training_leaves_a_model_that_loads_alone_and_the_promised_metrics(captioned: Any) -> None:
    model = load_model(captioned.model)
    assert isinstance(model, Captioner)
    images = torch.randn(2, 3, 16, 16)
    assert model.generate(images, decoding="greedy").shape[0] == 2
    metrics = json.loads((captioned.save_dir / "drawn" / "metrics.json").read_text())
    promised = {"dataset", "mode", "seed", "epochs", "steps", "images_per_second", "train_seconds", "val_accuracy"}
    assert metrics.keys() >= promised | {"parameters_total", "parameters_active"}
    assert (metrics["epochs"], metrics["steps"]) == (2, 6)


def test_captions_of_ones_own_shapes_are_not_judged_as_the_drawn_ones(
    captioned: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioning, "score_captions", lambda *_: {})  # METEOR's Java takes seconds
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "shapes").symlink_to(captioned.folder)
    where = ("--save_dir", tmp_path / "own", "--output_dir", tmp_path, "--data_dir", tmp_path / "sets")
    result = cli("test", "--dataset", "shapes", "--checkpoint", captioned.model, *where, "--device", "cpu")
    assert result.code == 0, result.err
    assert "test, 8 pictures" in result.out
    metrics = json.loads((tmp_path / "own" / "shapes" / "metrics.json").read_text())
    assert metrics["dataset"] == "shapes"
    assert not [name for name in metrics if name.startswith("captions_right")]


def test_the_sheet_is_of_the_whole_split_with_the_share_of_new_pairs_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shapes, "SPLIT_SIZES", {"train": 8, "validation": 4, "test": 48})
    split: Any = load_dataset(DataConfig(dataset="shapes"), PictureSpec(16, 3)).test
    rows = captioning.Captioning().examples(split, SHEET)
    assert len(rows.unique()) == SHEET
    assert split.held_out[rows].float().mean() == split.held_out.float().mean() == 0.25
    figure = captioning.sheet(split, rows, [f"written of {row}" for row in rows.tolist()])
    for axes, row in zip(figure.axes, rows.tolist(), strict=True):
        own, reference, *mark = (" ".join(text.get_text().split()) for text in axes.texts)
        assert (own, reference) == (f"written of {row}", split.captions[row][0])
        assert mark == ["new pair"] * bool(split.held_out[row])
    assert captioning.Captioning().examples(split, 99).tolist() == list(range(48))


def test_every_score_has_a_name_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SPLIT_SIZES", {"train": 4, "validation": 2, "test": 8})
    data = load_dataset(DataConfig(dataset="shapes"), PictureSpec(8, 3))
    split: Any = data.test
    owners = torch.arange(8)
    texts = [texts[0] for texts in split.captions]
    alone = dataclasses.replace(split, captions=tuple((text,) for text in texts))
    metrics = retrieval_metrics(torch.eye(8), torch.eye(8), owners) | {"test_loss": 1.25, "test_accuracy": 0.5}
    metrics |= captioning._shapes_metrics(texts, alone, torch.eye(8), torch.eye(8), owners)
    metrics |= dict.fromkeys(("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider", "meteor"), 0.125)
    lines = captioning.Captioning().report_lines(metrics, data)
    assert len(lines) == len(metrics)
    assert not [line for line in lines if "_" in line]
    told = dict(line.strip().rsplit(maxsplit=1) for line in lines)
    assert told["next-token loss, nats"] == "1.250"
    assert told["captions right, known pairs"] == told["captions right, new pairs"] == "100.0%"
    assert (told["picture -> text R@1"], told["text -> picture median rank"]) == ("100.0%", "1")


def test_testing_adds_captions_retrieval_and_pictures(captioned: Any, cli: Cli, tmp_path: Path) -> None:
    save_dir = shutil.copytree(captioned.save_dir, tmp_path / "checkpoints")
    where = ("--save_dir", save_dir, "--output_dir", tmp_path, "--device", "cpu")
    result = cli("test", "--dataset", captioned.folder, *where, *captioned.architecture)
    assert result.code == 0, result.err
    metrics = json.loads((save_dir / "drawn" / "metrics.json").read_text())
    for name in ("bleu1", "bleu4", "rouge_l", "cider", "i2t_r1", "i2t_r10", "t2i_r1", "t2i_median_rank"):
        assert name in metrics
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D", "picture -> text R@10", "text -> picture median rank"):
        assert f"  {name} " in result.out
    assert metrics["epochs"] == 2  # what training wrote is kept
    written = json.loads((tmp_path / "drawn" / "captions.json").read_text())
    assert len(written) == 8
    assert all(len(row["references"]) == 5 and row["caption"] for row in written)
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "captions.json",
        "captions.png",
        "retrieval.png",
        "training_curves.png",
    }


@pytest.mark.parametrize("mode", ["test", "train_test"])
def test_testing_overwrites_no_captions_of_others(captioned: Any, cli: Cli, tmp_path: Path, mode: str) -> None:
    mine = tmp_path / "drawn" / "captions.json"
    mine.parent.mkdir()
    mine.write_text("{}")
    save_dir = captioned.save_dir if mode == "test" else tmp_path / "save"
    before = sorted(captioned.save_dir.rglob("*"))
    where = ("--save_dir", save_dir, "--output_dir", tmp_path)
    result = cli(mode, "--dataset", captioned.folder, *where, *captioned.flags)
    assert result.code == 2
    assert f"{mine} is not one that this program wrote" in result.err
    assert mine.read_text() == "{}"
    assert (sorted(captioned.save_dir.rglob("*")), (tmp_path / "save").exists()) == (before, False)


def test_captions_that_were_written_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    for references in (None, [["ein Hund", "狗"]]):
        path.write_text(captions_as_text(["é.png"], ["a dog"], references), encoding="utf-8")
        assert is_captions_file(path)
    for text in (
        "",
        "[",
        "[1]",
        "{}",
        '[{"image": 1}]',
        path.read_text() + "\n",
        path.read_text().replace("狗", "\\u72d7"),
    ):
        path.write_text(text)
        assert not is_captions_file(path)


def test_models_of_the_other_task_are_refused(captioned: Any, trained: Any, cli: Cli, tmp_path: Path) -> None:
    result = cli("caption", captioned.pictures[0], "--checkpoint", trained.model, "--output_dir", tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "tells classes apart" in result.err
    tested = cli("test", "--dataset", "digits", "--checkpoint", captioned.model, "--save_dir", tmp_path / "save")
    assert (tested.code, tested.err.count("\n")) == (2, 1)
    assert "for another task than digits's" in tested.err


def test_captions_have_no_mean_over_views(captioned: Any, cli: Cli, tmp_path: Path, drawn: list[Path]) -> None:
    where = ("--dataset", captioned.folder, "--save_dir", captioned.save_dir, "--output_dir", tmp_path / "pictures")
    for argv in (
        ("test", *where, *captioned.architecture, "--tta", "flip"),
        ("predict", "--checkpoint", captioned.model, "--tta", "flip", "--text", "a red circle", drawn[0]),
    ):
        result = cli(*argv)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert "tta is 'flip': it averages the probabilities of classes" in result.err
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("flag", ["mixup", "cutmix"])
def test_captions_are_not_mixed(captioned: Any, cli: Cli, tmp_path: Path, flag: str) -> None:
    flags = ("--save_dir", tmp_path / "save", *captioned.flags, f"--{flag}", 0.2)
    result = cli("train", "--dataset", captioned.folder, *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"{flag} is 0.2" in result.err
    assert not (tmp_path / "save").exists()


def test_captions_have_no_classes_to_weigh(captioned: Any, cli: Cli, tmp_path: Path) -> None:
    flags = ("--save_dir", tmp_path / "save", *captioned.flags, "--class_weights", "balanced")
    result = cli("train", "--dataset", captioned.folder, *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "class_weights is 'balanced': captions have no classes" in result.err


def test_captions_need_a_fusion(captioned: Any, cli: Cli, tmp_path: Path) -> None:
    flags = ("--save_dir", tmp_path / "save", *captioned.flags, "--fusion_layers", 0)
    result = cli("train", "--dataset", captioned.folder, *flags)
    assert result.code == 2
    assert "fusion_layers is 0" in result.err
