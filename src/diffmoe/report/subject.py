"""What a report is about: a trained model, pictures that it has not seen, and what is known of its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe.config import DataConfig, GenerationConfig, VisualizationConfig
from diffmoe.config.recipes import generation_config
from diffmoe.data.batches import PictureBatches
from diffmoe.data.pictures import LazyImages
from diffmoe.evaluation.classification import (
    Predictions,
    as_predictions,
    classification_metrics,
    take_predictions,
)
from diffmoe.evaluation.experts import BlockRouting, RoutingCollector
from diffmoe.evaluation.passes import Collect, Kept, run_over
from diffmoe.inference import Predictor
from diffmoe.model.captioner import Captioner
from diffmoe.model.encoders import AttentionMap
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.layers import evaluating
from diffmoe.tasks.base import Metrics, Runtime

EXAMPLES = 4
"""Pictures that are looked at one by one."""


@dataclass(frozen=True)
class Subject:
    """What takes a pass over the pictures is computed once, when it is first asked for.

    Some of it only the one task has; the sections that ask for it are that task's.
    """

    predictor: Predictor
    split: Any
    """`Split` or `CaptionSplit`."""
    history: list[Metrics]
    """Of its training, an epoch a row; empty where it is not there."""
    metrics: Mapping[str, object]
    """What training and testing wrote of it; empty where that is not there."""
    show: VisualizationConfig

    @property
    def images(self) -> Tensor | LazyImages:
        """uint8 (N, C, H, W)."""
        return self.split.images

    @property
    def classifier(self) -> ImageClassifier:
        """The model, of a report on classes."""
        return cast(ImageClassifier, self.predictor.model)

    @property
    def captioner(self) -> Captioner:
        """The model, of a report on captions."""
        return cast(Captioner, self.predictor.model)

    @property
    def class_names(self) -> tuple[str, ...]:
        """C of them; none of a captioner."""
        return self.predictor.info.class_names

    @cached_property
    def examples(self) -> Tensor:
        """Rows of the pictures that are looked at one by one, int64."""
        return self.predictor.task.examples(self.split, EXAMPLES)

    @property
    def runtime(self) -> Runtime:
        """How the model is run."""
        return Runtime(self.predictor.device, DataConfig.num_workers)

    def batches(self, rows: Tensor | None = None) -> PictureBatches[Any]:
        """Batches of the pictures at `rows`, or of all, as evaluation wants them."""
        used, split = self.predictor, self.split if rows is None else self.split.subset(rows)
        return used.task.in_order(used.model.config, split, used.picture, self.runtime)

    @cached_property
    def _pass(self) -> tuple[tuple[BlockRouting, ...], Kept]:
        """The routing of all pictures and, where there are labels, the predictions."""
        batches, routing, predictions = self.batches(), RoutingCollector(), Kept(take_predictions)
        shown = tqdm(batches.epoch(), "looking", total=len(batches), unit=" batches", leave=False, disable=None)
        wanted: list[Collect] = [routing.add, predictions.add] if self.class_names else [routing.add]
        run_over(self.predictor.model, shown, *wanted, classes=self.predictor.classes)
        return routing.blocks(), predictions

    @property
    def blocks(self) -> tuple[BlockRouting, ...]:
        """The routed blocks of all towers, with where they sent all pictures."""
        return self._pass[0]

    @property
    def image_blocks(self) -> tuple[BlockRouting, ...]:
        """Those of the image tower."""
        return tuple(block for block in self.blocks if block.place == "image")

    @cached_property
    def predictions(self) -> Predictions:
        """A classifier's, of all pictures."""
        return as_predictions(self._pass[1])

    @cached_property
    def scores(self) -> dict[str, Any]:
        """A classifier's, of all pictures, as `classification_metrics` has them."""
        return classification_metrics(self.predictions, len(self.class_names))

    @cached_property
    def attention(self) -> tuple[AttentionMap, ...]:
        """The attention of the examples, all of them together, as they are answered."""
        used, pictures = self.predictor, self._example_pictures
        batch = used.task.answered(used.model, pictures, self.generation)
        with evaluating(used.model), torch.no_grad():
            return used.model.run(batch, classes=used.classes, need_weights=True).attention

    @property
    def _example_pictures(self) -> Tensor:
        return self.predictor.prepare(self.images[self.examples])

    def attention_of(self, example: int) -> list[AttentionMap]:
        """The maps of one example: (1, H, N, S) each. A classifier's text tower has none of its own for a picture."""
        maps = [m for m in self.attention if m.place != "text"]
        return [dataclasses.replace(m, weights=m.weights[example : example + 1]) for m in maps]

    @property
    def generation(self) -> GenerationConfig:
        """How captions are written: as the dataset's recipe says."""
        return generation_config(self.predictor.info.dataset)

    @cached_property
    def written(self) -> Tensor:
        """The captions that a captioner writes for the examples, (B, T) int64."""
        return self.predictor.task.answered(self.captioner, self._example_pictures, self.generation)[1]
