"""The baseline: the `tiny` model as one would write it first, with torch as it comes.

The same classifier, with the loop with masks for its routed pools, torch's fused attention kernel, AdamW without
`fused`, stock float32 products, and an allocator that gives memory back.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from classifiers import Batch, TrainingStep
from peers import LoopWithMasks
from torch import Tensor
from torch.optim import AdamW

from diffmoe.hardware import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts

STOCK_LARGEST = 32 * 2**20
"""glibc raises its mmap threshold to the largest buffer that was freed, up to this, and trims at twice as much: where
a training step's buffers bring it at once."""


def naive_classifier(model: ImageClassifier) -> ImageClassifier:
    """The same model with the same weights and outputs: fused attention, and loops with masks for the pools."""
    naive = ImageClassifier(dataclasses.replace(model.config, attention="fused"), model.class_tokens, model.class_mask)
    naive.load_state_dict(model.state_dict())
    for block in naive.modules():
        if isinstance(block, UnifiedModalEncoder) and isinstance(block.general_experts, GeneralExperts):
            block.general_experts = LoopWithMasks(block.general_experts)
    return naive


class NaiveStep:
    """The naive model's training step, as a contender."""

    def __init__(self, model: ImageClassifier, device: str = "cpu") -> None:
        self.step = TrainingStep(model, "float32", device, optimizer=AdamW(model.parameters()))

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One step."""
        with freed_memory_goes_back():
            return self.step(batch)


@contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Undo `keep_freed_memory` for a while, where it has an effect."""
    if not keep_freed_memory():
        yield
        return
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    mallopt(M_MMAP_THRESHOLD, STOCK_LARGEST)
    mallopt(M_TRIM_THRESHOLD, 2 * STOCK_LARGEST)
    try:
        yield
    finally:
        keep_freed_memory()
