"""Where a model looked: attention over the patches of pictures, summed up.

The maps are those of `model.run(batch, need_weights=True).attention`, of any head.
Shapes: B pictures, N patches, T tokens of a caption, W words, S tokens of a context, C classes, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.config import END_ID
from diffmoe.data.text import detokenize
from diffmoe.model.encoders import AttentionMap
from diffmoe.model.heads import Head
from diffmoe.model.layers import evaluating
from diffmoe.model.outputs import TextFeatures


def image_maps(maps: Sequence[AttentionMap]) -> tuple[AttentionMap, ...]:
    """Those of the image tower, whose patches attend to each other. Raises `ValueError` where there are none."""
    found = tuple(attention for attention in maps if attention.place == "image")
    if not found:
        raise ValueError("there are no attention maps of the image tower: call the model with need_weights=True")
    return found


def rollout(maps: Sequence[AttentionMap]) -> Tensor:
    """Attention rollout: how much of each patch is left in each token after the image tower; (B, N, N), rows sum to 1.

    The product `A_L ... A_2 A_1` over blocks of `A = 0.5 W + 0.5 I`: W the attention weights, mean over heads, I the
    residual connection beside them (Abnar and Zuidema 2020, "Quantifying attention flow in Transformers", eq. 1).
    The picture's embedding is the mean of its tokens, so `rollout(maps).mean(1)` is how much each patch is in it.
    """
    total: Tensor | None = None
    for attention in image_maps(maps):
        weights_BNN = attention.weights.float().mean(1)
        mixing_BNN = 0.5 * weights_BNN + 0.5 * torch.eye(weights_BNN.shape[-1], device=weights_BNN.device)
        total = mixing_BNN if total is None else mixing_BNN @ total
    assert total is not None
    return total


def received(maps: Sequence[AttentionMap]) -> Tensor:
    """The attention that each patch gets, mean over the patches that look, heads and blocks; (B, N), rows sum to 1."""
    return torch.stack([attention.weights.float().mean((1, 2)) for attention in image_maps(maps)]).mean(0)


def word_attention(maps: Sequence[AttentionMap], tokens: Tensor) -> list[tuple[list[str], Tensor]]:
    """The caption's attention to the picture as each of its words was written.

    A word is written by the tokens before it: the one at t says which comes at t + 1. So its row is that of the token
    before; where a word has several pieces, the mean of their rows. Mean over heads and the fusion's layers.

    Args:
        maps: of `captioner(images, tokens, need_weights=True)`.
        tokens: (B, T) int64, captions as `tokenize` or `Captioner.generate` return them.

    Returns:
        For each picture its W words and punctuation marks (the caption's start and end are none), and (W, N) over the
        patches, rows sum to 1.
    """
    attention_BTN = _cross_attention(maps)
    if attention_BTN.shape[:2] != tokens.shape:
        raise ValueError(f"attention maps of {tuple(attention_BTN.shape[:2])} tokens for {tuple(tokens.shape)} tokens")
    found: list[tuple[list[str], Tensor]] = []
    for attention_TN, row in zip(attention_BTN, tokens.tolist(), strict=True):
        written = row[1 : row.index(END_ID) if END_ID in row else len(row)]
        groups = _pieces_of_words(written)
        rows = [attention_TN[group].mean(0) for group in groups]  # piece g of `written` is token g + 1: row g wrote it
        words = detokenize([[written[piece] for piece in group] for group in groups])
        found.append((words, torch.stack(rows) if rows else attention_TN[:0]))
    return found


def _pieces_of_words(ids: Sequence[int]) -> list[list[int]]:
    """The positions of the pieces of each word."""
    # Id 0 is "!", which goes on with a word: the tokenizer sets a space between only where the piece before ended one.
    ends = [" " in text for text in detokenize([[id, 0] for id in ids])]
    groups: list[list[int]] = []
    is_new = True
    for position, is_end in enumerate(ends):
        groups += [[]] if is_new else []
        groups[-1].append(position)
        is_new = is_end
    return groups


def description_attention(maps: Sequence[AttentionMap]) -> Tensor:
    """Of a classifier that reads descriptions: the share of each patch's attention that each class gets, (B, C, N).

    The C shares of a patch sum to 1. Mean over heads and the fusion's layers.
    """
    return _cross_attention(maps).transpose(1, 2)


def _cross_attention(maps: Sequence[AttentionMap]) -> Tensor:
    """A sequence's attention to its context, mean over heads and the fusion's layers: (B, T or N, S)."""
    crossing = [attention.weights.float().mean(1) for attention in maps if attention.cross]
    if not crossing:
        raise ValueError("there are no maps of cross-attention: nothing in this model reads another modality")
    return torch.stack(crossing).mean(0)


def patch_similarity(model: Head, images: Tensor, classes: TextFeatures) -> Tensor:
    """The cosine of each patch's feature with each class description, in the space they share; (B, C, N), -1 to 1.

    The picture's embedding is the direction of the mean of the same projected features, so a class that the zero-shot
    head finds in the picture is found where these are high.

    Args:
        model: any, of whose fusion nothing is used.
        images: (B, channels, H, W) float, normalised.
        classes: C texts: `ImageClassifier.class_features()`, or `model.backbone.text_features(...)` of others.
    """
    with evaluating(model), torch.no_grad():
        features_BND = model.backbone.image_features(images).features
        projected_BND = F.normalize(model.backbone.image_projection(features_BND), dim=-1)
        return (projected_BND @ classes.embedding.T).transpose(1, 2).float()
