"""The task of telling classes apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffmoe.baselines import Baseline
from diffmoe.config import DataConfig, GenerationConfig, ModelConfig, UserError
from diffmoe.config.settings import Settings
from diffmoe.data.batches import Batches, MixedBatches, PictureBatches
from diffmoe.data.descriptions import class_descriptions
from diffmoe.data.loading import Dataset, Part
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.splits import Split
from diffmoe.data.super_classes import super_classes
from diffmoe.data.text import tokenize
from diffmoe.evaluation.classification import (
    Predictions,
    averaged_accuracy,
    calibration_error,
    classification_metrics,
    fit_temperature,
    pick_examples,
    predict,
    take_predictions,
)
from diffmoe.evaluation.passes import Autocast, Kept, Scores, run_over
from diffmoe.model.heads import Classifier, ImageClassifier
from diffmoe.model.outputs import TextFeatures
from diffmoe.model.routers import ROUTERS, router_kind
from diffmoe.tasks.base import Metrics, Runtime, Task, Tested


class Classification(Task):
    """Pictures with labels; one head on the picture's embedding, and the descriptions of the classes beside it."""

    data_kind = "classification"
    head = Classifier
    curve = "Accuracy"
    sections = (
        *("scores", "training_curves", "predictions", "confusion_matrix", "calibration", "per_class", "utilization"),
        *("load_over_time", "routing_maps", "favourite_patches", "specialization", "coactivation"),
        *("router_confidence", "attention_maps", "attention_rollout", "class_maps", "embedding_space"),
        "without_experts",
    )

    def check(self, settings: Settings) -> None:
        """Where routers are guided, they must be able to follow."""
        super().check(settings)
        config = settings.model
        if (weight := config.router_guidance_weight) > 0:
            told = f"router_guidance_weight is {weight}"
            if config.dense:
                raise UserError(f"{told}: this model is dense, and has no router to guide; give 0")
            if not router_kind(config.router).guidable:
                able = ", ".join(name for name, kind in ROUTERS.items() if kind.guidable)
                raise UserError(f"{told}: router {config.router!r} cannot be guided; give 0 or one of {able}")

    def build(self, settings: Settings, data: Dataset) -> Classifier:
        """With as many classes as the data has."""
        found = len(data.class_names)
        if "num_classes" in settings.given and settings.model.num_classes != found:
            raise UserError(f"num_classes is {settings.model.num_classes}: {data.name} has {found} classes")
        config = dataclasses.replace(settings.model, num_classes=found)
        if config.architecture != "moe":
            return Baseline(config)
        parts = data.parts or (Part(data.name, data.known_as, data.class_names),)
        sentences = [of_class for part in parts for of_class in class_descriptions(part.known_as, part.class_names)]
        return ImageClassifier(config, *class_tokens(sentences, config.max_text_len))

    def made_up(self, settings: Settings) -> Classifier:
        """Its class descriptions are templates of made-up names."""
        config = settings.model
        if config.architecture != "moe":
            return Baseline(config)
        names = [f"class {number}" for number in range(config.num_classes)]
        return ImageClassifier(
            config, *class_tokens(class_descriptions(settings.data.dataset, names), config.max_text_len)
        )

    def class_weights(self, settings: Settings, data: Dataset) -> Tensor | None:
        """Balanced: the same for each class as a whole, and 1 on average over the pictures."""
        if settings.training.class_weights == "none":
            return None
        counts = data.train.labels.bincount(minlength=len(data.class_names))
        return (len(data.train) / (len(counts) * counts)).float()

    def super_classes(self, settings: Settings, data: Dataset) -> Tensor | None:
        """By what the classes' training pictures look like, and the sets that they are of."""
        if settings.model.router_guidance_weight == 0:
            return None
        classes_of_part = [len(part.class_names) for part in data.parts] or [len(data.class_names)]
        return super_classes(data.train, classes_of_part, settings.model.num_general_experts)

    def noise(self, model: Any, batch_size: int) -> Sequence[Tensor]:
        config = model.config
        images = torch.randn(batch_size, config.in_channels, config.img_size, config.img_size)
        return images, torch.randint(config.num_classes, (batch_size,))

    def batches(
        self, model: ModelConfig, split: Split, picture: PictureSpec, batch_size: int, **options: Any
    ) -> Batches | MixedBatches:
        """Pictures and labels; mixed, with both labels, where the augmentation says so."""
        augment: DataConfig | None = options.get("augment")
        kind = MixedBatches if augment is not None and augment.mixes else Batches
        return kind(split, batch_size, picture=picture, **options)

    def validate(self, model: Any, batches: PictureBatches[Split], autocast: Autocast = nullcontext) -> Metrics:
        """With the `temperature` that fits best."""
        scores, kept = Scores(model), Kept(take_predictions)
        run_over(model, batches.epoch(), scores.add, kept.add, autocast=autocast)
        labels, logits = kept.tensors()[:2]
        temperature = fit_temperature(Predictions(logits, labels))
        return {"val_loss": scores.loss, "val_accuracy": scores.accuracy, "temperature": temperature}

    def test(self, model: Any, data: Dataset, runtime: Runtime, settings: Settings, temperature: float = 1.0) -> Tested:
        """Accuracy, confusion, calibration; with tta also the accuracy that it gives."""
        from diffmoe.visualization import figures

        batches = self.in_order(model.config, data.test, data.picture, runtime)
        predictions = predict(model, batches.epoch(), autocast=runtime.autocast)
        found = classification_metrics(predictions, len(data.class_names))
        calibrated = dataclasses.replace(predictions, logits=predictions.logits / temperature)
        found["ece_calibrated"] = calibration_error(calibrated)
        shown = pick_examples(predictions, settings.visualization.examples, seed=0)
        names = data.class_names
        drawn = {
            "confusion_matrix": figures.confusion_matrix(torch.tensor(found["confusion_matrix"]), names),
            "predictions": figures.prediction_grid(
                data.test.images[shown], data.test.labels[shown], predictions.probabilities[shown], names
            ),
            "calibration": figures.reliability_diagram(predictions),
            "per_class": figures.per_class(
                found["precision"], found["recall"], names, settings.visualization.weakest_classes
            ),
        }
        named = {name if name == "zero_shot_accuracy" else f"test_{name}": value for name, value in found.items()}
        tta, averaged = settings.run.tta, None  # None takes an earlier test's figure away
        if tta != "none":
            averaged = averaged_accuracy(model, batches.epoch(), tta, runtime.autocast)
        by_set = _by_set(data, predictions)
        views = {"test_accuracy_tta": averaged, "tta": None if averaged is None else tta}
        return Tested({**named, **by_set, **views, "class_names": list(names)}, drawn)

    def report_lines(self, metrics: Mapping[str, Any], data: Dataset) -> list[str]:
        shown = {
            "test_accuracy": "accuracy",
            "test_accuracy_tta": "accuracy, mean over the views",
            "test_top5_accuracy": "top-5 accuracy",
            "zero_shot_accuracy": "zero-shot accuracy, by descriptions",
            "test_ece": "calibration error",
            "test_ece_calibrated": "calibration error, by temperature",
        }
        if len(data.class_names) <= 5:
            del shown["test_top5_accuracy"]  # it is always 100%
        shown |= {f"test_accuracy_{part.name}": f"accuracy on {part.name}" for part in data.parts}
        lines = [f"  {label:36}{metrics[name]:7.2%}" for name, label in shown.items() if metrics.get(name) is not None]
        width = max(len(name) for name in data.class_names)
        lines.append(f"  {'class':{width}}  precision  recall")
        for name, precision, recall in zip(
            data.class_names, metrics["test_precision"], metrics["test_recall"], strict=True
        ):
            lines.append(f"  {name:{width}}  {precision:9.1%}  {recall:6.1%}")
        return lines

    def classify(self, model: Classifier, pictures: Tensor, classes: TextFeatures | None, temperature: float) -> Tensor:
        return (model.run((pictures,), classes=classes).logits.float() / temperature).softmax(-1).cpu()

    def caption(self, model: Any, pictures: Tensor, config: GenerationConfig, seed: int) -> list[str]:
        """It cannot."""
        raise UserError(
            "this model tells classes apart: captions need one that was trained on captions, as on flickr8k"
        )

    def compare(
        self, model: ImageClassifier, pictures: Tensor, text: str, classes: TextFeatures | None, temperature: float
    ) -> list[dict[str, object]]:
        """`with_text`, the classes given both.

        Picture and text are taken as independent given the class: their product, scaled, is the probability given both.
        """
        assert classes is not None  # or it would read no texts
        tokens, mask = (t.to(pictures.device) for t in tokenize([text], model.config.max_text_len))
        similarity = classes.embedding @ model.backbone.encode_text(tokens, mask)[0]
        given_text = (model.backbone.scale * similarity).softmax(-1).cpu()
        both = self.classify(model, pictures, classes, temperature) * given_text
        return [{"with_text": row} for row in both / both.sum(1, keepdim=True)]

    def reads_texts(self, model: Classifier) -> bool:
        """With the descriptions of its classes."""
        return isinstance(model, ImageClassifier) and model.class_tokens is not None

    def answered(self, model: Classifier, pictures: Tensor, config: GenerationConfig) -> Sequence[Tensor]:
        """A class is read from the picture alone."""
        return (pictures,)

    def examples(self, split: Split, count: int) -> Tensor:
        """The first picture of each of some classes."""
        first = [int((split.labels == label).nonzero()[0]) for label in split.labels.unique().tolist()]
        return torch.tensor(first[:: -(-len(first) // count)][:count])


def _by_set(data: Dataset, predictions: Predictions) -> dict[str, float]:
    """`test_accuracy_<set>` of each of several sets, whose pictures are told from those of all."""
    found, start = {}, 0
    for part in data.parts:
        own = (predictions.labels >= start) & (predictions.labels < start + len(part.class_names))
        right = predictions.probabilities[own].argmax(1) == predictions.labels[own]
        found[f"test_accuracy_{part.name}"] = right.float().mean().item()
        start += len(part.class_names)
    return found


def class_tokens(sentences: Sequence[Sequence[str]], max_len: int) -> tuple[Tensor, Tensor]:
    """The classes' descriptions as (C, S, T) tokens and mask; of each class as many as all have."""
    count = min(map(len, sentences))
    tokens, mask = tokenize([sentence for of_class in sentences for sentence in of_class[:count]], max_len)
    shape = (len(sentences), count)
    return tokens.unflatten(0, shape), mask.unflatten(0, shape)
