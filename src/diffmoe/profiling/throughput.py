"""Pictures a second against batch size, in inference and in training, of a model and of the dense one beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from diffmoe.config import TrainingConfig
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.layers import evaluating
from diffmoe.objectives import CaptionObjective, ClassificationObjective
from diffmoe.training import make_optimizer, train_step

Head = ImageClassifier | Captioner
Draw = Callable[[int], Sequence[Tensor]]
"""Batch size -> a batch as the training of the task has it, on the device: a new one at each call."""


class Contender:
    """A model as it is used, and as it is trained: with the optimizer's and the loop's own step."""

    def __init__(self, model: Head, config: TrainingConfig, fabric: Fabric) -> None:
        kind = CaptionObjective if isinstance(model, Captioner) else ClassificationObjective
        self.model, self.config, self.fabric = model, config, fabric
        self.objective: nn.Module = kind(model, config.label_smoothing)  # pyright: ignore[reportArgumentType]
        self.wrapped, self.optimizer = fabric.setup(self.objective, make_optimizer(model, config))

    def train(self, batch: Sequence[Tensor]) -> None:
        """One training step, whole but for its effect: at the rate 0, or the routing would drift away."""
        train_step(self.fabric, self.wrapped, self.optimizer, [batch], 0.0, self.config.clip_norm)

    def infer(self, batch: Sequence[Tensor], classes: Any) -> None:
        """Pictures to classes, whose descriptions were read before; or pictures and their captions to logits."""
        with self.fabric.autocast():
            if isinstance(self.model, Captioner):
                self.model(*batch)
            else:
                self.model(batch[0], classes=classes)


@dataclass(frozen=True)
class Speed:
    """One model's at one batch size."""

    model: str
    """moe or dense."""
    mode: str
    """inference or training."""
    batch_size: int
    seconds: tuple[float, ...]
    """Of one step in each round; rounds of all models correspond."""

    @property
    def images_per_second(self) -> float:
        """By the median step."""
        return self.batch_size / median(self.seconds)


def ratio(speed: Speed, base: Speed) -> float:
    """Time of one over time of the other: the median of the rounds' ratios, which a busy machine moves least."""
    return median(a / b for a, b in zip(speed.seconds, base.seconds, strict=True))


def race(contenders: dict[str, Contender], batch_sizes: Sequence[int], draw: Draw, rounds: int) -> Iterator[Speed]:
    """Time every model at every batch size, by turns in one process, on the same new batches; yields as it goes.

    A turn is a step that is not timed, after which caches and allocator are the model's own again, and one that is.
    """
    for batch_size in batch_sizes:
        for mode in ("inference", "training"):
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            names = list(contenders)
            for number in range(rounds + 1):  # the first is for warming up
                batches = draw(batch_size), draw(batch_size)
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    elapsed = _turn(contenders[name], mode, batches)
                    if number:
                        seconds[name].append(elapsed)
            for name, values in seconds.items():
                yield Speed(name, mode, batch_size, tuple(values))


def _turn(contender: Contender, mode: str, batches: Sequence[Sequence[Tensor]]) -> float:
    model = contender.model
    if mode == "training":
        model.train()
        return _time(contender.train, batches)
    with evaluating(model), torch.inference_mode():
        classes = model.class_features() if isinstance(model, ImageClassifier) else None
        return _time(lambda batch: contender.infer(batch, classes), batches)


def _time(step: Callable[[Sequence[Tensor]], object], batches: Sequence[Sequence[Tensor]]) -> float:
    """Seconds of the step on the last batch, after one on the first."""
    seconds = 0.0
    for batch in batches:
        synchronize(batch[0].device)
        start = time.perf_counter()
        step(batch)
        synchronize(batch[0].device)
        seconds = time.perf_counter() - start
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
