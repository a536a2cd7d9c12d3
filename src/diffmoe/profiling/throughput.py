"""Pictures a second against batch size, in inference and in training, of a model and of the dense one beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from diffmoe.config import TrainingConfig
from diffmoe.model.layers import evaluating
from diffmoe.training import make_optimizer, train_step

Batch = Sequence[Tensor]


class Contender:
    """A model as it is used, by `infer` on it, a batch and what it read of its classes, and as it is trained."""

    def __init__(self, model: nn.Module, objective: nn.Module, infer: Callable, config: TrainingConfig, fabric: Fabric):
        self.model, self.objective, self.infer, self.config, self.fabric = model, objective, infer, config, fabric
        self.wrapped, self.optimizer = fabric.setup(objective.train(), make_optimizer(model, config))
        self.wait = torch.cuda.synchronize if fabric.device.type == "cuda" else lambda: None

    def train(self, batch: Batch) -> None:
        """One training step, whole but for its effect: at the rate 0, or the routing would drift away."""
        train_step(self.fabric, self.wrapped, self.optimizer, [batch], 0.0, self.config.clip_norm)

    @contextmanager
    def inference(self) -> Iterator[Callable[[Batch], Any]]:
        """What to call with a batch within; class descriptions, where there are any, are read before."""
        with evaluating(self.model), torch.inference_mode(), self.fabric.autocast():
            classes = getattr(self.model, "class_features", lambda: None)()
            yield lambda batch: self.infer(self.model, batch, classes)


def race(
    contenders: dict[str, Contender], batch_sizes: Sequence[int], draw: Callable[[int], Batch], rounds: int
) -> Iterator[dict[str, Any]]:
    """Time every model, "dense" among them, in each mode at every batch size, by turns, on the same new batches.

    A turn is a step that is not timed, after which caches and allocator are the model's own again, and one that is.
    """
    for size in batch_sizes:
        for mode in ("inference", "training"):
            ms: dict[str, list[float]] = {name: [] for name in contenders}
            for number in range(rounds + 1):  # the first is for warming up
                batches = draw(size), draw(size)
                for name in sorted(contenders, reverse=number % 2 == 0):
                    one, spent = contenders[name], 0.0
                    with one.inference() if mode == "inference" else nullcontext(one.train) as step:
                        for batch in batches:
                            start = time.perf_counter()
                            step(batch)
                            one.wait()
                            spent = 1000 * (time.perf_counter() - start)
                    ms[name].append(spent)
            for name, (_, *times) in ms.items():
                row = {"model": name, "mode": mode, "batch_size": size, "ms": median(times)}
                row |= {"images_per_second": 1000 * size / median(times)}
                yield row | {"time_over_dense": median(map(float.__truediv__, times, ms["dense"][1:]))}
