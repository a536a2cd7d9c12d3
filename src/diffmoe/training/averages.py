"""Averaged weights: what a run validates and keeps, where it is told to, in the place of the last step's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffmoe.model.heads import Head


class Averages:
    """Exponential moving average of a model's weights and of its buffers, such as BatchNorm's statistics.

    After step t (from 0) an average keeps min(decay, (1 + t) / (10 + t)) of itself: the first steps, of weights that
    are soon worth nothing, are soon forgotten. What is no floating number is the model's own.

    torch's `AveragedModel` waits for the device in each step where the decay depends on it.

    Args:
        model: whose averages these are; where they begin.
        decay: at most how much of an average stays, 0 to 1.
    """

    def __init__(self, model: Head, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        """With averages for weights."""
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, model: Head) -> None:
        """After an optimizer step; never within `forward`."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages, values = [], []
        for average, value in zip(_tensors(self.model), _tensors(model), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        # All in one call, as torch.optim.swa_utils has it.
        torch._foreach_lerp_(averages, values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self.steps += 1

    def state(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """For a checkpoint; `weights` is the state dict of the whole `model`."""
        return {"steps": self.steps, "model": dict(weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What `state` returned. Raises `ValueError` and what `load_state_dict` raises where it did not."""
        if not isinstance(steps := state["steps"], int) or steps < 0:
            raise ValueError(f"steps is {steps!r}")
        self.model.load_state_dict(state["model"])
        self.steps = steps


def _tensors(model: Head) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
