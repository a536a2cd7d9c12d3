"""One pass of a model over batches: what each asks for is kept, all else is let go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.model.heads import Head
from diffmoe.model.layers import evaluating
from diffmoe.model.outputs import TextFeatures

Autocast = Callable[[], AbstractContextManager[object]]
"""The number format that the model runs in; what is made of its outputs is in float32."""


Collect = Callable[[Sequence[Tensor], Any], object]
"""Keeps something of a batch and of what the head made of it, its `Output`."""


def run_over(
    model: Head,
    batches: Iterable[Sequence[Tensor]],
    *collects: Collect,
    autocast: Autocast = nullcontext,
    classes: TextFeatures | None = None,
) -> None:
    """Run `model` once over `batches`, without gradients and in evaluation mode.

    `classes` are its `class_features`; None computes them, once.
    Raises `ValueError` where there are no batches, `UserError` where the model's numbers are not finite.
    """
    count = 0
    with evaluating(model), finite_or_told(), torch.inference_mode():
        with autocast():
            classes = model.class_features() if classes is None else classes
        for batch in batches:
            with autocast():
                output = model.run(batch, classes=classes)
            for collect in collects:
                collect(batch, output)
            count += 1
    if not count:
        raise ValueError("there are no pictures to look at")


@contextmanager
def finite_or_told() -> Iterator[None]:
    """What is not a number in a model's outputs, which its routers report too, as a `UserError`."""
    try:
        yield
    except FloatingPointError as error:
        message = "the model's outputs are not finite: its training diverged; train it with a lower lr"
        raise UserError(message) from error


class Kept:
    """Keeps what a function takes of each batch and its output: tensors with a row for each picture."""

    def __init__(self, take: Callable[[Sequence[Tensor], Any], tuple[Tensor, ...]]) -> None:
        self.take = take
        self.taken: list[tuple[Tensor, ...]] = []

    def add(self, batch: Sequence[Tensor], output: Any) -> None:
        self.taken.append(tuple(tensor.cpu() for tensor in self.take(batch, output)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Of all batches, on the CPU, as ordinary tensors (not those of inference mode)."""
        return tuple(torch.cat(column) for column in zip(*self.taken, strict=True))


class Scores:
    """Loss and accuracy over all targets of all batches."""

    def __init__(self, model: Head) -> None:
        self.model = model
        self.loss_sum = 0.0
        self.right = self.num_targets = self.num_pictures = 0

    def add(self, batch: Sequence[Tensor], output: Any) -> None:
        loss, accuracy, num_targets = self.model.score(batch, output)
        self.loss_sum += float(loss) * num_targets
        self.right += round(float(accuracy) * num_targets)  # a count: no rounding of float32 is left in it
        self.num_targets += num_targets
        self.num_pictures += len(batch[0])

    @property
    def loss(self) -> float:
        """Mean over targets, in nats; nan where there were none."""
        return self.loss_sum / self.num_targets if self.num_targets else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of targets that were told right; nan where there were none."""
        return self.right / self.num_targets if self.num_targets else float("nan")
