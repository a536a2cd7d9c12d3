"""Small models, what they are shown, and routing made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from tests.small import SMALL
from torch import Tensor

from diffmoe.config import ModelConfig
from diffmoe.evaluation.classification import predict
from diffmoe.evaluation.experts import BlockRouting
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import Head, ImageClassifier, Score
from diffmoe.model.outputs import ClassifierOutput, ImageFeatures, TextFeatures

CONFIG = dataclasses.replace(
    SMALL,
    img_encoder_layers=2,
    num_general_experts=4,
    expansion_factor=4,
    vocab_size=60,
    max_text_len=6,
    dropout=0.5,
    initializer_range=0.3,
)


def classifier(descriptions: bool = False, **fields: Any) -> ImageClassifier:
    """Of 8x8 pictures in 3 classes, in training mode."""
    torch.manual_seed(0)
    tokens = torch.randint(60, (3, 2, 6)) if descriptions else None
    return ImageClassifier(dataclasses.replace(CONFIG, **fields), tokens).train()


def captioner(output_tokens: Tensor | None = None, **fields: Any) -> Captioner:
    """Of 8x8 pictures, with a vocabulary of 60, in training mode."""
    torch.manual_seed(0)
    return Captioner(dataclasses.replace(CONFIG, **fields), output_tokens).train()


def pictures(sizes: tuple[int, ...] = (5, 3)) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of so many, with labels."""
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        yield (
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )


def many_pictures() -> Iterator[tuple[Tensor, Tensor]]:
    """200."""
    return pictures((140, 60))


def captions(sizes: tuple[int, ...] = (4, 2)) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches whose longest texts differ: 6 tokens, then 4."""
    generator = torch.Generator().manual_seed(2)
    for size, longest in zip(sizes, (6, 4), strict=True):
        lengths = torch.tensor([longest] + [3] * (size - 1))
        mask = (torch.arange(longest) < lengths[:, None]).long()
        yield (
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(1, 60, (size, longest), generator=generator) * mask,
            mask,
        )


def accuracy(model: ImageClassifier) -> float:
    """On many pictures."""
    predictions = predict(model, many_pictures())
    return (predictions.predicted == predictions.labels).double().mean().item()


def block(ids: Tensor | list[Any], num_experts: int, gates: Tensor | None = None) -> BlockRouting:
    """Of expert ids (N, T, K)."""
    ids = torch.as_tensor(ids)
    gates = torch.where(ids >= 0, 1 / ids.shape[-1], 0.0) if gates is None else gates
    blank = torch.zeros(ids.shape[:2])
    return BlockRouting("image", 0, num_experts, ids.short(), gates, blank, blank)


def random_block(num_pictures: int = 6, num_tokens: int = 5, top_k: int = 2, num_experts: int = 4) -> BlockRouting:
    """Distinct experts for each token, and some padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(num_pictures, num_tokens, num_experts, generator=generator).argsort(-1)[..., :top_k]
    ids[1, 3:] = -1
    return block(ids, num_experts)


class StubHead(Head):
    """What evaluation asks of a head, and no backbone."""

    kind = "stub"
    decides_in = frozenset()

    @classmethod
    def restore(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> Self:
        raise NotImplementedError

    def like(self, config: ModelConfig) -> Self:
        raise NotImplementedError

    def num_targets(self, batch: Sequence[Tensor]) -> int:
        return len(batch[0])

    def score(self, batch: Sequence[Tensor], output: ClassifierOutput, label_smoothing: float = 0.0) -> Score:
        raise NotImplementedError


def answer(embedding: Tensor, logits: Tensor, zero_shot_logits: Tensor | None = None) -> ClassifierOutput:
    """What a head makes of pictures."""
    image = ImageFeatures(embedding[:, None], embedding, embedding)
    return ClassifierOutput(embedding=embedding, image=image, logits=logits, zero_shot_logits=zero_shot_logits)


def number(value: float) -> TextFeatures:
    """Classes that stand for one number."""
    t = torch.tensor(value)
    return TextFeatures(tokens=t, features=t, mask=t, mean=t, pooled=t, embedding=t, first=t)
