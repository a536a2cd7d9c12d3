"""What a head on the multimodal model is, and the one that tells classes apart.

Shapes: B pictures, C classes, S descriptions a class, T text tokens, D width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import ModelConfig
from diffmoe.losses import router_guidance_loss
from diffmoe.model.layers import full_precision, widened
from diffmoe.model.multimodal import MultiModalMoE
from diffmoe.model.outputs import ClassifierOutput, Output, TextFeatures
from diffmoe.model.sequence import Context, TokenSequence


class Score(NamedTuple):
    """How well a batch was told: means over its targets, 0 where it has none."""

    loss: Tensor
    """Scalar, cross-entropy in nats a target."""
    accuracy: Tensor
    """Scalar, 0 to 1."""
    num_targets: int


class Head(nn.Module, ABC):
    """A model that can be trained and scored: the multimodal model, and what one task puts on it."""

    kind: ClassVar[str]
    """What a model file calls it."""
    decides_in: ClassVar[frozenset[str]]
    """The places (image, text, fusion) whose blocks the answer goes through for each picture."""
    config: ModelConfig
    backbone: MultiModalMoE

    @classmethod
    @abstractmethod
    def restore(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> Self:
        """The head whose state dict `state` is, not loaded yet: the state tells what the config does not."""

    @abstractmethod
    def like(self, config: ModelConfig) -> Self:
        """A fresh one of another config, with the same classes or words."""

    def class_features(self) -> TextFeatures | None:
        """The descriptions of the classes through the text tower, read once for many batches; None without any."""
        return None

    @abstractmethod
    def run(
        self,
        batch: Sequence[Tensor],
        *,
        classes: TextFeatures | None = None,
        need_weights: bool = False,
        need_losses: bool = False,
    ) -> Output:
        """A batch of the task's data, pictures first. `classes` are the `class_features`; None computes them."""

    def answer(self, batch: Sequence[Tensor], *, classes: TextFeatures | None = None) -> Output:
        """`run` as far as the logits: what a prediction costs."""
        return self.run(batch, classes=classes)

    @abstractmethod
    def num_targets(self, batch: Sequence[Tensor]) -> Tensor | int:
        """How many classes or tokens are to be told."""

    @abstractmethod
    def score(self, batch: Sequence[Tensor], output: Any, label_smoothing: float = 0.0) -> Score:
        """Cross-entropy and accuracy of what `run` made of the batch."""


class Classifier(Head):
    """A head that tells classes apart: its batches are pictures (B, C, H, W) and their labels (B,) int64."""

    @abstractmethod
    def run(
        self,
        batch: Sequence[Tensor],
        *,
        classes: TextFeatures | None = None,
        need_weights: bool = False,
        need_losses: bool = False,
    ) -> ClassifierOutput:
        """Labels are read for the losses only."""

    def num_targets(self, batch: Sequence[Tensor]) -> int:
        """A picture is one."""
        return len(batch[0])

    def score(
        self,
        batch: Sequence[Tensor],
        output: ClassifierOutput,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> Score:
        """As `Head` says; `label_smoothing` is the mass spread evenly over the classes, and `class_weights`, (C,), how
        much the loss of a picture of each counts.

        Of pictures that were mixed, `data.batches.MixedBatch`, both labels are to be told, each by its share.
        """

        def loss_of(label_B: Tensor) -> Tensor:
            loss_B = F.cross_entropy(output.logits, label_B, label_smoothing=label_smoothing, reduction="none")
            return loss_B if class_weights is None else loss_B * class_weights[label_B]

        labels = batch[1]
        loss_B = loss_of(labels)
        if len(batch) > 2:  # mixed pictures: the labels of the other ones too, and how much each picture has of itself
            _, _, others, share = batch
            loss_B = torch.lerp(loss_of(others), loss_B, share.to(loss_B))  # Fabric rounds what it hands a model
        loss = loss_B.mean()
        return Score(loss, (output.logits.argmax(-1) == labels).float().mean(), len(labels))

    def guidance_loss(self, batch: Sequence[Tensor], output: Output, expert_of_class: Tensor) -> Tensor:
        """How far the image tower's routing is from the experts of the pictures' super-classes, summed over its blocks.

        For training alone: the labels of the batch reach no logits. Of a mixed picture each class has its share.

        Args:
            batch: as `score`'s.
            output: what `run` made of it.
            expert_of_class: (C, E), 1 at the expert of each class's super-class, else 0.
        """
        target_BE = expert_of_class[batch[1]]
        if len(batch) > 2:
            target_BE = torch.lerp(expert_of_class[batch[2]], target_BE, batch[3].to(target_BE)[:, None])
        loss = target_BE.new_zeros(())
        for routing in output.image.routing:
            loss = loss + router_guidance_loss(routing.probs, target_BE)
        return loss


class ImageClassifier(Classifier):
    """Picture classifier: a linear head on the embedding, beside a zero-shot head that compares with descriptions.

    The class is read from the picture alone, or (`classify_with: descriptions`) from the picture fused with the
    descriptions of *all* classes, the same for every picture. Labels enter the auxiliary losses only.

    Args:
        config: the model's; num_classes is C.
        class_tokens: (C, S, T) int64, S descriptions of each class; None: no text, no zero-shot.
        class_mask: (C, S, T), 1 at real tokens.
    """

    kind = "classifier"
    decides_in = frozenset({"image", "fusion"})  # its texts are the descriptions of the classes, the same for all

    class_tokens: Tensor | None
    class_mask: Tensor | None

    def __init__(
        self, config: ModelConfig, class_tokens: Tensor | None = None, class_mask: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.reads_descriptions = config.classify_with == "descriptions"
        if class_tokens is None and self.reads_descriptions:
            raise ValueError("classify_with is 'descriptions': class_tokens are needed")
        if class_tokens is not None and len(class_tokens) != config.num_classes:
            raise ValueError(f"descriptions of {len(class_tokens)} classes for num_classes {config.num_classes}")
        # A head that never reads the fusion does not pay for one.
        backbone = config if self.reads_descriptions else dataclasses.replace(config, fusion_layers=0)
        self.backbone = MultiModalMoE(backbone)
        self.head = nn.Linear(config.embed_dim, config.num_classes)
        nn.init.normal_(self.head.weight, std=config.initializer_range)
        nn.init.zeros_(self.head.bias)
        if class_tokens is not None and class_mask is None:
            class_mask = torch.ones_like(class_tokens)
        self.register_buffer("class_tokens", class_tokens)
        self.register_buffer("class_mask", class_mask)

    @classmethod
    def restore(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> Self:
        return cls(config, state.get("class_tokens"), state.get("class_mask"))

    def like(self, config: ModelConfig) -> Self:
        return type(self)(config, self.class_tokens, self.class_mask)

    def run(
        self,
        batch: Sequence[Tensor],
        *,
        classes: TextFeatures | None = None,
        need_weights: bool = False,
        need_losses: bool = False,
    ) -> ClassifierOutput:
        """Pictures (B, C, H, W) and, for the losses, their labels (B,) int64."""
        return self.classify(batch[0], batch[1] if need_losses else None, classes, need_weights, need_losses)

    def class_features(self) -> TextFeatures | None:
        """As `Head` says; in training one sentence a class, drawn anew; else the mean of all S."""
        if self.class_tokens is None or self.class_mask is None:
            return None
        num_classes, num_sentences = self.class_tokens.shape[:2]
        if self.training:
            drawn = torch.randint(num_sentences, (num_classes,), device=self.class_tokens.device)
            rows = torch.arange(num_classes, device=drawn.device)
            return self.backbone.text_features(self.class_tokens[rows, drawn], self.class_mask[rows, drawn])
        text = self.backbone.text_features(self.class_tokens.flatten(0, 1), self.class_mask.flatten(0, 1))
        by_class = {
            name: getattr(text, name).unflatten(0, (num_classes, num_sentences)).mean(1)
            for name in ("mean", "pooled", "embedding")
        }
        by_class["embedding"] = F.normalize(by_class["embedding"], dim=-1)
        first = torch.arange(num_classes, device=text.first.device)
        return dataclasses.replace(text, **by_class, first=first)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        classes: TextFeatures | None = None,
        need_weights: bool = False,
        need_losses: bool = True,
    ) -> dict[str, Any]:
        """As `classify`, as a dict: what `MultiModalMoE` returns, with logits (B, C) and, where there are descriptions,
        zero_shot_logits (B, C).
        """
        return self.classify(images, labels, classes, need_weights, need_losses).as_dict()

    def classify(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        classes: TextFeatures | None = None,
        need_weights: bool = False,
        need_losses: bool = False,
    ) -> ClassifierOutput:
        """Classify.

        Args:
            images: (B, channels, H, W) float, normalised.
            labels: (B,) int64, for the contrastive and alignment losses; they never reach the logits.
            classes: what `class_features` returned; None computes it.
            need_weights: also return the attention maps.
            need_losses: also compute the model's own losses; a prediction needs none.
        """
        image = self.backbone.image_features(images, need_weights)
        classes = self.class_features() if classes is None else classes
        fused, embedding = None, image.pooled
        if self.reads_descriptions and classes is not None:
            context = Context(classes.pooled.expand(len(images), -1, -1))
            fused = self.backbone.fuse(TokenSequence(image.features), context, need_weights)
            embedding = fused.features.mean(1)
        with full_precision(embedding):
            logits, zero_shot = self.head(widened(embedding)), None
            if classes is not None:
                zero_shot = self.backbone.scale * image.embedding @ classes.embedding.T
        out = ClassifierOutput(
            embedding=embedding, image=image, text=classes, fused=fused, logits=logits, zero_shot_logits=zero_shot
        )
        if not need_losses:
            return out
        own = self.backbone.losses(out.routing, image, classes, text_of_image=labels)
        return dataclasses.replace(out, losses=own)
