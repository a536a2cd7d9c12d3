"""What a model makes of pictures and texts.

Shapes: B pictures, U texts, N image tokens, T text tokens, D width, C classes, P width of the text embedding, V tokens
that can be written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffmoe.model.encoders import AttentionMap, Encoded
from diffmoe.model.routing import Routing


@dataclass(frozen=True)
class ImageFeatures:
    """Pictures after the image tower."""

    features: Tensor
    """(B, N, D) tokens."""
    pooled: Tensor
    """(B, D) their mean."""
    embedding: Tensor
    """(B, D) float32, unit norm, in the space shared with text."""
    routing: tuple[Routing, ...] = ()
    attention: tuple[AttentionMap, ...] = ()


@dataclass(frozen=True)
class TextFeatures:
    """Texts after the text tower."""

    tokens: Tensor
    """(U, T) int64 ids, -1 at padding."""
    features: Tensor
    """(U, T, D) tokens."""
    mask: Tensor
    """(U, T) bool, True at real tokens."""
    mean: Tensor
    """(U, D) mean over real tokens."""
    pooled: Tensor
    """(U, D) the token at the end of the text, the only one that has read all of it."""
    embedding: Tensor
    """(U, D) float32, unit norm, in the space shared with pictures."""
    first: Tensor
    """(U,) int64, the first text that is equal to each."""
    routing: tuple[Routing, ...] = ()
    attention: tuple[AttentionMap, ...] = ()


PARTS = ("router_z_loss", "router_balance_loss", "cross_modal_loss", "contrastive_loss")
"""The model's own losses, which are reported one by one."""


@dataclass(frozen=True)
class Losses:
    """The model's own losses, float32 scalars."""

    router_loss: Tensor
    """The weighted sum of the others, and of what else is switched on."""
    router_z_loss: Tensor
    router_balance_loss: Tensor
    cross_modal_loss: Tensor
    contrastive_loss: Tensor

    def parts(self) -> dict[str, Tensor]:
        """All but the sum, by name."""
        return {name: getattr(self, name) for name in PARTS}


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model makes of a batch."""

    embedding: Tensor
    """(B, D) pooled; of what was fused, where something was and the head asks for it."""
    image: ImageFeatures
    text: TextFeatures | None = None
    fused: Encoded | None = None
    losses: Losses | None = None
    """None where they were not asked for."""

    @property
    def routing(self) -> tuple[Routing, ...]:
        """One a block: image tower, text tower, fusion."""
        return tuple(routing for part in self._parts() for routing in part.routing)

    @property
    def attention(self) -> tuple[AttentionMap, ...]:
        """Likewise; empty where it was not asked for."""
        return tuple(attention for part in self._parts() for attention in part.attention)

    def _parts(self) -> list[ImageFeatures | TextFeatures | Encoded]:
        return [part for part in (self.image, self.text, self.fused) if part is not None]

    def as_dict(self) -> dict[str, Any]:
        """As `forward` returns it, by the names that users know."""
        of_head = {field.name for field in dataclasses.fields(self)} - {
            field.name for field in dataclasses.fields(Output)
        }
        return {
            **(vars(self.losses) if self.losses else {}),
            "embedding": self.embedding,
            "image_features": self.image.features,
            "text_features": self.text.features if self.text else None,
            "fused_features": self.fused.features if self.fused else None,
            "routing": self.routing,
            "attention": self.attention,
            **{name: value for name in of_head if (value := getattr(self, name)) is not None},
        }


@dataclass(frozen=True, kw_only=True)
class ClassifierOutput(Output):
    """With the classes."""

    logits: Tensor
    """(B, C) float32."""
    zero_shot_logits: Tensor | None = None
    """(B, C) float32, scaled cosine similarities of picture and class; None without descriptions."""


@dataclass(frozen=True, kw_only=True)
class CaptionerOutput(Output):
    """With the next token of each caption."""

    caption_features: Tensor
    """(B, T, P)."""
    logits: Tensor | None = None
    """(B, T, V), at t those of token t + 1; None where they were not asked for."""
