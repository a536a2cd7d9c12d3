"""Models small enough to derive their steps by hand, and what trains them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from diffmoe.config import ModelConfig, TrainingConfig
from diffmoe.data.batches import PictureBatches
from diffmoe.model.heads import Head, Score
from diffmoe.model.outputs import ImageFeatures, Losses, Output
from diffmoe.training import objective
from diffmoe.training.objective import Trainee

Batch = tuple[Tensor, Tensor]


class Regression(Head):
    """Least squares in float64: no BatchNorm, so a batch's gradient is the mean of its pictures'."""

    kind = "regression"
    decides_in = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    @classmethod
    def restore(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> Self:
        raise NotImplementedError

    def like(self, config: ModelConfig) -> Self:
        raise NotImplementedError

    def run(self, batch: Sequence[Tensor], **_: Any) -> Output:
        return made_of(self.layers(batch[0]))

    def num_targets(self, batch: Sequence[Tensor]) -> int:
        return len(batch[0])

    def score(self, batch: Sequence[Tensor], output: Output, label_smoothing: float = 0.0) -> Score:
        loss = (output.embedding - batch[1]).square().mean()
        return Score(loss, torch.zeros(()), len(batch[0]))


class Diverging(Regression):
    """Its loss is not finite."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def score(self, batch: Sequence[Tensor], output: Output, label_smoothing: float = 0.0) -> Score:
        found = super().score(batch, output)
        return found._replace(loss=found.loss * self.factor)


def made_of(embedding: Tensor, router_loss: float | Tensor = 0.0, part: float = 0.0) -> Output:
    """An output with these losses: `router_loss`, and each of its parts is `part`."""
    losses = Losses(torch.as_tensor(router_loss), *(torch.tensor(part) for _ in range(4)))
    return Output(embedding=embedding, image=ImageFeatures(embedding, embedding, embedding), losses=losses)


def make_trainee(model: Head, fabric: Fabric | None = None, **config: Any) -> Trainee:
    """With plain SGD at a rate of 1: Adam would hide a gradient of the wrong size."""
    settings = TrainingConfig(**{"clip_norm": 0.0, "label_smoothing": 0.0, **config})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), lr=1.0))
        # float64 stays as it is; Fabric's own "64-true" would round the loss.
        return Trainee(fabric or Fabric(accelerator="cpu", devices=1), model, settings)


class ListBatches(PictureBatches[Any]):
    """Of random pictures, the same in every epoch."""

    def __init__(self, *sizes: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batches: list[Batch] = [
            (torch.randn(n, 3, generator=generator).double(), torch.zeros(n, 2).double()) for n in sizes
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        return iter(self.batches[start:])
