"""The task of telling classes apart: how its training begins, and its test."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

from diffmoe import evaluation
from diffmoe.checkpoint import DataInfo
from diffmoe.commands.preparation import (
    EVALUATION_BATCH,
    TrainingParts,
    data_info,
    open_for_test,
    parameter_counts,
    training_options,
)
from diffmoe.config import ModelConfig, UserError
from diffmoe.data import Batches, ImageDataset, Split, class_descriptions, load_dataset, tokenize
from diffmoe.model.heads import ImageClassifier
from diffmoe.objectives import ClassificationObjective
from diffmoe.settings import Settings
from diffmoe.training import Metrics


def prepare(settings: Settings, fabric: Fabric) -> TrainingParts:
    """The data, the model from its seed, and what the loop needs of them."""
    config = settings.training
    with fabric.rank_zero_first():  # the others find the cache that it made
        size = {"img_size": settings.model.img_size, "in_channels": settings.model.in_channels}
        data = load_dataset(settings.data, **size, progress=fabric.is_global_zero)
    info = data_info(data, settings.data)
    batches = Batches(
        data.train,
        config.batch_size,
        **training_options(settings, fabric, info),
    )
    validation = _in_order(data.validation, info, fabric.device, settings.data.num_workers)
    torch.manual_seed(config.seed)
    tokens, mask = class_tokens(data.known_as, data.class_names, settings.model.max_text_len)
    model = ImageClassifier(_with_classes(settings, data), tokens, mask)
    summary = (
        f"{data.name}: {len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test "
        f"pictures, {len(data.class_names)} classes"
    )
    objective = ClassificationObjective(model, config.label_smoothing)
    return TrainingParts(model, objective, batches, lambda: _validate(model, validation), info, summary)


def test(settings: Settings) -> None:
    """Score a model file on the test split: updates metrics.json, draws the pictures, prints the figures."""
    from diffmoe.visualization import figures

    parts = open_for_test(settings, ImageClassifier, load_dataset)
    data, info, model = parts.data, parts.info, parts.model
    if data.class_names != info.class_names:
        raise UserError(f"{parts.path} was trained on the classes of {info.dataset}, not on those of {data.name}")
    batches = _in_order(data.test, info, parts.device, settings.data.num_workers)
    predictions = _predict(model, batches)
    metrics = evaluation.classification_metrics(predictions, len(info.class_names))
    parts.files.update_metrics(
        {"dataset": data.name, "mode": settings.mode}
        | parameter_counts(model)
        | {name if name == "zero_shot_accuracy" else f"test_{name}": value for name, value in metrics.items()}
        | {"class_names": list(info.class_names)}
    )
    show = settings.visualization
    shown = evaluation.pick_examples(predictions, show.examples, seed=0)
    drawn = {
        "confusion_matrix": figures.confusion_matrix(torch.tensor(metrics["confusion_matrix"]), info.class_names),
        "predictions": figures.prediction_grid(
            data.test.images[shown], data.test.labels[shown], predictions.probabilities[shown], info.class_names
        ),
        "calibration": figures.reliability_diagram(predictions),
        "per_class": figures.per_class(metrics["precision"], metrics["recall"], info.class_names, show.weakest_classes),
    }
    if history := parts.files.read_history():
        drawn["training_curves"] = figures.training_curves(history)
    for name, figure in drawn.items():
        figures.save(figure, parts.pictures / f"{name}.{show.figure_format}", dpi=show.dpi)
    _print_metrics(metrics, info.class_names, len(data.test))
    print(f"metrics: {parts.files.metrics}   pictures: {parts.pictures}/")


def _with_classes(settings: Settings, data: ImageDataset) -> ModelConfig:
    """The model's config with as many classes as the data has."""
    found = len(data.class_names)
    if "num_classes" in settings.given and settings.model.num_classes != found:
        raise UserError(f"num_classes is {settings.model.num_classes}: {data.name} has {found} classes")
    return dataclasses.replace(settings.model, num_classes=found)


def class_tokens(dataset: str, class_names: Sequence[str], max_len: int) -> tuple[Tensor, Tensor]:
    """The classes' descriptions as (C, S, T) tokens and mask."""
    sentences = class_descriptions(dataset, class_names)
    tokens, mask = tokenize([sentence for of_class in sentences for sentence in of_class], max_len)
    shape = (len(sentences), len(sentences[0]))
    return tokens.unflatten(0, shape), mask.unflatten(0, shape)


def _in_order(split: Split, info: DataInfo, device: torch.device, num_workers: int) -> Batches:
    """A split as it is, for evaluation."""
    return Batches(split, EVALUATION_BATCH, mean=info.mean, std=info.std, device=device, num_workers=num_workers)


def _predict(model: ImageClassifier, batches: Batches) -> evaluation.Predictions:
    with evaluation.evaluating(model), torch.inference_mode():
        classes = model.class_features()
    return evaluation.predict(model, batches.epoch(), classes=classes, need_losses=False)


def _validate(model: ImageClassifier, batches: Batches) -> Metrics:
    predictions = _predict(model, batches)
    right = predictions.predicted == predictions.labels
    loss = F.cross_entropy(predictions.logits, predictions.labels)
    return {"val_loss": loss.item(), "val_accuracy": right.float().mean().item()}


def _print_metrics(metrics: dict[str, Any], class_names: Sequence[str], num_pictures: int) -> None:
    print(f"test, {num_pictures:,} pictures")
    for name, label in (
        ("accuracy", "accuracy"),
        ("top5_accuracy", "top-5 accuracy"),
        ("zero_shot_accuracy", "zero-shot accuracy, by descriptions"),
        ("ece", "calibration error"),
    ):
        if name in metrics:
            print(f"  {label:36}{metrics[name]:7.2%}")
    width = max(len(name) for name in class_names)
    print(f"  {'class':{width}}  precision  recall")
    for row in zip(class_names, metrics["precision"], metrics["recall"], strict=True):
        print(f"  {row[0]:{width}}  {row[1]:9.1%}  {row[2]:6.1%}")
