"""What a task is: how its data becomes a model, and how that is judged and shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffmoe.config import VOCAB_SIZE, GenerationConfig, ModelConfig, RunConfig, UserError
from diffmoe.config.settings import Settings
from diffmoe.data.batches import PictureBatches
from diffmoe.data.loading import Dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.sources import Kind
from diffmoe.evaluation.passes import Autocast
from diffmoe.model.heads import Head
from diffmoe.model.outputs import TextFeatures
from diffmoe.model.routers import router_kind
from diffmoe.storage.run_files import Metrics


@dataclass(frozen=True)
class Runtime:
    """How a model is run: where, and how batches are brought to it."""

    device: torch.device
    num_workers: int = 0
    autocast: Autocast = nullcontext
    """The number format that the model runs in."""


@dataclass(frozen=True)
class Tested:
    """What came of a test split."""

    metrics: Mapping[str, object]
    """As metrics.json has them."""
    figures: dict[str, Figure]
    """By file name, without ending."""
    texts: dict[str, str] = field(default_factory=dict)
    """Text files by name."""


class Task(ABC):
    """One for all of its models: it has no state."""

    data_kind: ClassVar[Kind]
    """The kind of data that it learns from."""
    head: ClassVar[type[Head]]
    sections: ClassVar[tuple[str, ...]]
    """The parts of the report, functions of `report.sections`, in order."""
    curve: ClassVar[str]
    """What `val_accuracy` is the accuracy of, for a figure."""

    def check(self, settings: Settings) -> None:
        """Before any data is read. Raises `UserError` where no model of these settings can do the task."""
        config = settings.model
        if config.vocab_size < VOCAB_SIZE:
            raise UserError(f"vocab_size is {config.vocab_size}: the tokenizer needs at least {VOCAB_SIZE}")
        if not config.dense:
            router_kind(config.router)

    def notes(self, config: ModelConfig) -> list[str]:
        """What a user should know of a model with this config."""
        if config.dense or router_kind(config.router).dropless:
            return []
        return [f"router {config.router!r} looks at the whole batch: a prediction depends on the pictures beside it"]

    @abstractmethod
    def build(self, settings: Settings, data: Dataset) -> Head:
        """A fresh model for the data, from torch's generator. Raises `UserError` where they do not fit."""

    @abstractmethod
    def made_up(self, settings: Settings) -> Head:
        """A fresh model of the settings without any data, for measuring what it costs."""

    def class_weights(self, settings: Settings, data: Dataset) -> Tensor | None:
        """(C,) float32, how much the loss of a picture of each class counts; None: all the same."""
        return None

    def super_classes(self, settings: Settings, data: Dataset) -> Tensor | None:
        """The expert that each class's pictures are guided to, int64 (C,); None where routers are not guided.

        Raises `UserError` where there are fewer classes than experts.
        """
        del settings, data
        return None

    @abstractmethod
    def noise(self, model: Any, batch_size: int) -> Sequence[Tensor]:
        """A batch of the model's shape that means nothing, on the CPU."""

    @abstractmethod
    def batches(self, model: ModelConfig, split: Any, picture: PictureSpec, batch_size: int, **options: Any) -> Any:
        """A split's batches; options are those of `PictureBatches`."""

    def training_batches(
        self, settings: Settings, data: Dataset, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> PictureBatches[Any]:
        """The training split's, shuffled and augmented, for one of several ranks."""
        return self.batches(
            settings.model,
            data.train,
            data.picture,
            settings.training.batch_size,
            device=device,
            shuffle=True,
            seed=settings.training.seed,
            augment=settings.data,
            rank=rank,
            world_size=world_size,
            num_workers=settings.data.num_workers,
        )

    def in_order(self, model: ModelConfig, split: Any, picture: PictureSpec, runtime: Runtime) -> PictureBatches[Any]:
        """A split's as they are, for evaluation."""
        size = picture.evaluation_batch
        return self.batches(model, split, picture, size, device=runtime.device, num_workers=runtime.num_workers)

    @abstractmethod
    def validate(self, model: Any, batches: PictureBatches[Any], autocast: Autocast = nullcontext) -> Metrics:
        """`val_loss`, `val_accuracy`, and what the task adds."""

    @abstractmethod
    def test(self, model: Any, data: Dataset, runtime: Runtime, settings: Settings, temperature: float = 1.0) -> Tested:
        """Score the test split, and draw what is seen of it. `temperature` is the model file's."""

    @abstractmethod
    def report_lines(self, metrics: Mapping[str, Any], data: Dataset) -> list[str]:
        """A test's metrics as lines for the terminal."""

    def check_test(self, run: RunConfig, folder: Path) -> None:
        """Before work begins: raises `UserError` where `test` cannot do what it is told, or would write over a file of
        the user's in `folder`.
        """
        del run, folder

    def check_data(self, model_classes: tuple[str, ...], data: Dataset, path: str) -> None:
        """Raises `UserError` where the data is not of the kind that the model in `path` was trained on."""
        if data.class_names != model_classes:
            raise UserError(f"{path} was trained on other classes than those of {data.name}")

    # What a trained model can be asked; each raises `UserError` where it cannot.

    @abstractmethod
    def classify(self, model: Any, pictures: Tensor, classes: TextFeatures | None, temperature: float) -> Tensor:
        """(N, C, H, W) normalised -> (N, classes) probabilities, on the CPU: softmax(logits / temperature).

        `classes` are the `class_features`.
        """

    @abstractmethod
    def caption(self, model: Any, pictures: Tensor, config: GenerationConfig, seed: int) -> list[str]:
        """(N, C, H, W) normalised -> a sentence for each."""

    @abstractmethod
    def compare(
        self, model: Any, pictures: Tensor, text: str, classes: TextFeatures | None, temperature: float
    ) -> list[dict[str, object]]:
        """What a text adds that is said of each of (N, C, H, W) normalised pictures, beside its similarity.

        `classes` and `temperature` as in `classify`.
        """

    def reads_texts(self, model: Any) -> bool:
        """Whether the model was taught to compare a picture with a text."""
        return True

    @abstractmethod
    def answered(self, model: Any, pictures: Tensor, config: GenerationConfig) -> Sequence[Tensor]:
        """Normalised pictures (B, C, H, W) as a batch for `run`: with what the model answers, where it reads that."""

    @abstractmethod
    def examples(self, split: Any, count: int) -> Tensor:
        """Rows of pictures to look at one by one, int64."""
