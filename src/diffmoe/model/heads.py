"""Task heads on the multimodal model.

Shapes: B pictures, C classes, S descriptions a class, T text tokens, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import ModelConfig
from diffmoe.model.features import TextFeatures
from diffmoe.model.multimodal import MultiModalMoE


class ImageClassifier(nn.Module):
    """Picture classifier: a linear head on the embedding, beside a zero-shot head that compares with descriptions.

    The class is read from the picture alone, or (`classify_with: descriptions`) from the picture fused with the
    descriptions of *all* classes, the same for every picture. Labels enter the auxiliary losses only.

    Args:
        config: the model's; num_classes is C.
        class_tokens: (C, S, T) int64, S descriptions of each class; None: no text, no zero-shot.
        class_mask: (C, S, T), 1 at real tokens.
    """

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

    def class_features(self) -> TextFeatures | None:
        """The classes through the text tower: in training one sentence a class, drawn anew; else the mean of all S.

        Compute it once for many batches and hand it to `forward`; None without descriptions.
        """
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
        """Classify.

        Args:
            images: (B, channels, H, W) float, normalised.
            labels: (B,) int64, for the contrastive and alignment losses; they never reach the logits.
            classes: what `class_features` returned; None computes it.
            need_weights: also return the attention maps.
            need_losses: also return `router_loss` and its parts; a prediction needs none.

        Returns:
            What `MultiModalMoE` returns, with logits (B, C) and, where there are descriptions, zero_shot_logits
            (B, C): scaled cosine similarities of picture and class.
        """
        image = self.backbone.image_features(images, need_weights)
        classes = self.class_features() if classes is None else classes
        fused = None
        if self.reads_descriptions and classes is not None:
            context = classes.pooled.expand(len(images), -1, -1)
            fused = self.backbone.fuse(image.features, context, need_weights=need_weights)
        out = self.backbone.assemble(image, classes, fused, text_of_image=labels, need_losses=need_losses)
        out["logits"] = self.head(out["embedding"])
        if classes is not None:
            out["zero_shot_logits"] = self.backbone.scale * image.embedding @ classes.embedding.T
        return out
