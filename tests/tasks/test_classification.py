"""The task of telling classes apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffmoe import load_model
from diffmoe.config import DataConfig, UserError
from diffmoe.config.settings import parse_settings
from diffmoe.data.descriptions import class_descriptions
from diffmoe.data.loading import Dataset, load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.text import detokenize, tokenize
from diffmoe.evaluation.classification import Predictions, fit_temperature
from diffmoe.model.heads import ImageClassifier
from diffmoe.storage.run_files import RunFiles
from diffmoe.tasks.base import Runtime
from diffmoe.tasks.classification import Classification, class_tokens

TASK = Classification()


@pytest.fixture
def digits() -> Dataset:
    return load_dataset(DataConfig(test_fraction=0.7, val_fraction=0.5), PictureSpec(8, 1))


def test_a_model_gets_as_many_classes_as_the_data_has(digits: Dataset, tiny_flags: list[str]) -> None:
    flowers = dataclasses.replace(digits, class_names=("rose", "tulip"), known_as="flowers")
    model = TASK.build(parse_settings(tiny_flags, mode="train"), flowers)
    assert isinstance(model, ImageClassifier)
    assert model.config.num_classes == model.head.out_features == 2
    with pytest.raises(UserError, match=r"num_classes is 3: digits has 10 classes"):
        TASK.build(parse_settings([*tiny_flags, "--num_classes", "3"], mode="train"), digits)


def test_class_tokens_are_the_descriptions() -> None:
    names = ("airplane", "cat")
    tokens, mask = class_tokens(class_descriptions("cifar10", names), 32)
    sentences = class_descriptions("cifar10", names)
    assert tokens.shape == mask.shape == (2, len(sentences[0]), tokens.shape[-1])
    for row, expected in zip(tokens, sentences, strict=True):
        assert detokenize(row) == detokenize(tokenize(list(expected), 32)[0])


def test_validation_is_over_all_pictures_whatever_the_batches(trained: Any, digits: Dataset) -> None:
    model: Any = load_model(trained.model)
    split = digits.validation
    with torch.no_grad():
        logits = model(digits.picture.normalize(split.images))["logits"]
    loss, accuracy = F.cross_entropy(logits, split.labels), (logits.argmax(-1) == split.labels).float().mean()
    for batch_size in (1000, 64):
        batches = TASK.batches(model.config, split, digits.picture, batch_size)
        found = TASK.validate(model, batches)
        scores = {"val_loss": float(loss), "val_accuracy": float(accuracy)}
        best = fit_temperature(Predictions(logits, split.labels))
        assert found == pytest.approx(scores | {"temperature": best}, rel=1e-4)
    in_order = TASK.in_order(model.config, split, digits.picture, Runtime(torch.device("cpu")))
    assert TASK.validate(model, in_order) == pytest.approx(found)


def test_training_pictures_are_mixed_where_the_settings_say_so(digits: Dataset, tiny_flags: list[str]) -> None:
    for flags, size in (([], 2), (["--mixup", "0.2"], 4), (["--cutmix", "1"], 4)):
        settings = parse_settings([*tiny_flags, *flags], mode="train")
        loader = TASK.training_batches(settings, digits, torch.device("cpu"))
        assert len(next(iter(loader.epoch()))) == size
        in_order = TASK.in_order(settings.model, digits.validation, digits.picture, Runtime(torch.device("cpu")))
        assert len(next(iter(in_order.epoch()))) == 2


def test_balanced_weights_make_all_classes_count_the_same(digits: Dataset, tiny_flags: list[str]) -> None:
    rare = dataclasses.replace(digits.train, labels=digits.train.labels.clamp(max=2))  # most pictures are of class 2
    data = dataclasses.replace(digits, train=rare, class_names=("0", "1", "more"))
    assert TASK.class_weights(parse_settings(tiny_flags, mode="train"), data) is None
    weights = TASK.class_weights(parse_settings([*tiny_flags, "--class_weights=balanced"], mode="train"), data)
    assert weights is not None
    total = torch.stack([weights[label] * (rare.labels == label).sum() for label in range(3)])
    torch.testing.assert_close(total, torch.full((3,), len(rare) / 3))
    assert data.summary().endswith(
        f"3 classes, from more {int((rare.labels == 2).sum())} to 0 {int((rare.labels == 0).sum())} pictures: "
        "--class_weights balanced counts each class the same"
    )


def test_a_run_with_balanced_weights_learns_otherwise(cli: Any, tiny_flags: list[str], tmp_path: Path) -> None:
    losses = []
    for folder, (count, flags) in enumerate(((9, []), (9, ["--class_weights", "balanced"]))):
        for label in range(2):
            for number in range(count if label else 3 * count):
                picture = tmp_path / "uneven" / str(label) / f"{number}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 200 * label + number).save(picture)
        where = ("--dataset", tmp_path / "uneven", "--save_dir", tmp_path / str(folder), "--img_size", 8)
        result = cli("train", *tiny_flags, *where, "--in_channels", 1, "--epochs", 1, *flags)
        assert (result.code, result.err) == (0, "")
        assert "--class_weights balanced counts each class the same" in result.out
        losses.append(RunFiles("uneven", str(tmp_path / str(folder))).read_history()[0]["task_loss"])
    assert losses[0] != losses[1]


def test_examples_are_of_different_classes(digits: Dataset) -> None:
    for count, expected in ((10, 10), (4, 4), (99, 10), (1, 1)):
        rows = TASK.examples(digits.test, count)
        labels = digits.test.labels[rows].tolist()
        assert len(labels) == len(set(labels)) == expected


def test_other_classes_than_the_models_are_refused(digits: Dataset) -> None:
    TASK.check_data(tuple("0123456789"), digits, "model.pth")
    with pytest.raises(UserError, match=r"model\.pth was trained on other classes than those of digits"):
        TASK.check_data(("a", "b"), digits, "model.pth")


def test_top_5_is_told_where_it_can_be_wrong(digits: Dataset) -> None:
    for count, is_told in ((5, False), (6, True)):
        data = dataclasses.replace(digits, class_names=tuple("abcdefgh"[:count]))
        shares = [0.5] * count
        metrics = {"test_accuracy": 0.5, "test_top5_accuracy": 0.9, "test_ece": 0.1}
        lines = TASK.report_lines({**metrics, "test_precision": shares, "test_recall": shares}, data)
        assert any("top-5" in line for line in lines) is is_told
        assert len(lines) == 2 + is_told + 1 + count
