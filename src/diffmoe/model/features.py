"""What the two towers give of pictures and of texts.

Shapes: B pictures, U texts, N image tokens, T text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffmoe.model.encoders import AttentionMap
from diffmoe.model.moe import Routing


@dataclass(frozen=True)
class ImageFeatures:
    """Pictures after the image tower."""

    features: Tensor
    """(B, N, D) tokens."""
    pooled: Tensor
    """(B, D) their mean."""
    embedding: Tensor
    """(B, D) unit norm, in the space shared with text."""
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
    """(U, D) unit norm, in the space shared with pictures."""
    first: Tensor
    """(U,) int64, the first text that is equal to each."""
    routing: tuple[Routing, ...] = ()
    attention: tuple[AttentionMap, ...] = ()
