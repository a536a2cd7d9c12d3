"""Pictures a second against batch size, in inference and in training, of a model and of the dense one beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from diffmoe.model.layers import evaluating
from diffmoe.training.objective import Trainee

Batch = Sequence[Tensor]


class Contender(Trainee):
    """A model as it is used, and as it is trained: with the optimizer's and the loop's own step."""

    def wait(self) -> None:
        """For a GPU."""
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)

    def train(self, batch: Batch) -> None:
        """One training step, whole but for its effect: at the rate 0, or the routing would drift away."""
        self.objective.train()
        self.step([batch], 0.0)

    @contextmanager
    def inference(self) -> Iterator[Callable[[Batch], Any]]:
        """What to call with a batch within; class descriptions, where there are any, are read before."""
        with evaluating(self.model), torch.inference_mode(), self.fabric.autocast():
            classes = self.model.class_features()
            yield lambda batch: self.model.answer(batch, classes=classes)


def race(
    contenders: dict[str, Contender], batch_sizes: Sequence[int], draw: Callable[[int], Batch], rounds: int
) -> Iterator[dict[str, str | float]]:
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
                yield {
                    "model": name,
                    "mode": mode,
                    "batch_size": size,
                    "ms": median(times),
                    "images_per_second": 1000 * size / median(times),
                    "time_over_dense": median(map(float.__truediv__, times, ms["dense"][1:])),
                }
