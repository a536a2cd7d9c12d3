"""What a report is about: a trained model, pictures that it has not seen, and what is known of its training."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe.commands.preparation import EVALUATION_BATCH
from diffmoe.commands.use import UsedModel
from diffmoe.config import DataConfig, GenerationConfig, VisualizationConfig
from diffmoe.data import Batches, CaptionBatches, CaptionSplit, LazyImages, Split
from diffmoe.evaluation import Predictions, classification_metrics, evaluating
from diffmoe.evaluation.experts import BlockRouting, ExpertTrace, trace_experts
from diffmoe.model.captioner import Captioner
from diffmoe.model.encoders import AttentionMap
from diffmoe.model.heads import ImageClassifier
from diffmoe.recipes import generation_config
from diffmoe.training import Metrics

EXAMPLES = 4
"""Pictures that are looked at one by one."""
NUM_WORKERS = DataConfig.num_workers


@dataclass(frozen=True)
class Subject(ABC):
    """Of either task. What takes a pass over the pictures is computed once, when it is first asked for."""

    used: UsedModel
    model: ImageClassifier | Captioner
    split: Split | CaptionSplit
    history: list[Metrics]
    """Of its training, an epoch a row; empty where it is not there."""
    metrics: dict[str, Any]
    """What training and testing wrote of it; empty where that is not there."""
    show: VisualizationConfig

    @property
    def images(self) -> Tensor | LazyImages:
        """uint8 (N, C, H, W)."""
        return self.split.images

    @property
    def examples(self) -> Tensor:
        """Rows of the pictures that are looked at one by one, int64."""
        return torch.arange(min(EXAMPLES, len(self.images)))

    @abstractmethod
    def batches(self, rows: Tensor | None = None) -> Any:
        """Batches of the pictures at `rows`, or of all, as evaluation wants them."""

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What the model is handed with every batch."""
        return {}

    @cached_property
    def trace(self) -> ExpertTrace:
        """The routing of all pictures."""
        batches = self.batches()
        shown = tqdm(batches.epoch(), "looking", total=len(batches), unit=" batches", leave=False, disable=None)
        return trace_experts(self.used.model, shown, **self.constants)

    @property
    def image_blocks(self) -> tuple[BlockRouting, ...]:
        """The routed blocks of the image tower."""
        return self.trace.at("image")

    @cached_property
    def attention(self) -> tuple[AttentionMap, ...]:
        """The attention of the examples, all of them together."""
        with evaluating(self.used.model), torch.no_grad():
            return self.look(self.used.prepare(self.images[self.examples]))["attention"]

    @abstractmethod
    def look(self, pictures: Tensor) -> dict[str, Any]:
        """What the model returns of the examples, normalised, with attention maps."""

    def attention_of(self, example: int) -> list[AttentionMap]:
        """The maps of one example: (1, H, N, S) each. A classifier's text tower has none of its own for a picture."""
        maps = [m for m in self.attention if m.place != "text"]
        return [dataclasses.replace(m, weights=m.weights[example : example + 1]) for m in maps]

    def _options(self) -> dict[str, Any]:
        info = self.used.info
        return {"mean": info.mean, "std": info.std, "device": self.used.device, "num_workers": NUM_WORKERS}


@dataclass(frozen=True)
class Labelled(Subject):
    """A classifier and pictures with labels."""

    model: ImageClassifier
    split: Split

    @property
    def class_names(self) -> tuple[str, ...]:
        """C of them."""
        return self.used.info.class_names

    @property
    def examples(self) -> Tensor:
        """The first picture of each of some classes."""
        labels = self.split.labels
        first = [int((labels == label).nonzero()[0]) for label in labels.unique().tolist()]
        return torch.tensor(first[:: -(-len(first) // EXAMPLES)][:EXAMPLES])

    def batches(self, rows: Tensor | None = None) -> Batches:
        """Pictures and labels."""
        split = self.split if rows is None else self.split.subset(rows)
        return Batches(split, EVALUATION_BATCH, **self._options())

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The classes' features, so that descriptions are not read anew for each batch; and no losses."""
        return {"classes": self.used.classes, "need_losses": False}

    @property
    def predictions(self) -> Predictions:
        """Of all pictures."""
        assert self.trace.predictions is not None
        return self.trace.predictions

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Of all pictures, as `classification_metrics` has them."""
        return classification_metrics(self.predictions, len(self.class_names))

    def look(self, pictures: Tensor) -> dict[str, Any]:
        """As they are classified."""
        return self.model(pictures, need_weights=True, **self.constants)


@dataclass(frozen=True)
class Captioned(Subject):
    """A captioner and pictures with captions."""

    model: Captioner
    split: CaptionSplit

    def batches(self, rows: Tensor | None = None) -> CaptionBatches:
        """Pictures, each with its first caption."""
        split = self.split if rows is None else self.split.subset(rows)
        max_len = self.model.config.max_text_len
        return CaptionBatches(split, EVALUATION_BATCH, max_text_len=max_len, **self._options())

    @property
    def generation(self) -> GenerationConfig:
        """As the dataset's recipe says."""
        return generation_config(self.used.info.dataset)

    @cached_property
    def written(self) -> Tensor:
        """The captions that the model writes for the examples, (B, T) int64."""
        return self.model.generate(self.used.prepare(self.images[self.examples]), self.generation)

    def look(self, pictures: Tensor) -> dict[str, Any]:
        """As the model reads the captions that it wrote for them."""
        return self.model(pictures, self.written, need_weights=True, need_logits=False)
