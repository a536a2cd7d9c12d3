"""What every command that uses a trained model begins with: the model, and pictures as it wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffmoe.checkpoint import DataInfo, load_checkpoint
from diffmoe.commands.preparation import EVALUATION_BATCH
from diffmoe.data import LazyImages, normalize, read_picture, tokenize
from diffmoe.hardware import pick_device, use_fast_matmul
from diffmoe.model.captioner import Captioner
from diffmoe.model.features import TextFeatures
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.multimodal import MultiModalMoE


@dataclass(frozen=True)
class UsedModel:
    """A trained model on its device, and what it needs to know of its data."""

    model: ImageClassifier | Captioner
    info: DataInfo
    device: torch.device

    @property
    def backbone(self) -> MultiModalMoE:
        """The two towers and the fusion."""
        return self.model.backbone

    def read(self, paths: Sequence[str]) -> Tensor:
        """Picture files as uint8 (N, C, H, W) of the model's size. Raises `UserError` naming one that is none."""
        config = self.model.config
        size = {"img_size": config.img_size, "in_channels": config.in_channels}
        return torch.stack([read_picture(path, **size) for path in paths])

    def prepare(self, pictures: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> normalised float32, on the device."""
        return normalize(pictures.to(self.device), self.info.mean, self.info.std)

    @cached_property
    def classes(self) -> TextFeatures | None:
        """What a classifier's text tower says of its class descriptions, read once; None where there are none."""
        with torch.no_grad():
            return self.model.class_features() if isinstance(self.model, ImageClassifier) else None

    def encode_pictures(self, pictures: Tensor | LazyImages) -> Tensor:
        """uint8 (N, C, H, W), in memory or decoded on demand -> unit-norm embeddings (N, D), on the CPU."""
        rows = torch.arange(len(pictures)).split(EVALUATION_BATCH)
        with torch.inference_mode():
            chunks = [self.backbone.encode_image(self.prepare(pictures[part])).float().cpu() for part in rows]
        return torch.cat(chunks).clone()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> unit-norm embeddings (N, D), on the CPU. Those over the model's max_text_len are cut."""
        chunks = []
        with torch.inference_mode():
            for start in range(0, len(texts), EVALUATION_BATCH):
                tokens, mask = tokenize(texts[start : start + EVALUATION_BATCH], self.model.config.max_text_len)
                chunks.append(self.backbone.encode_text(tokens.to(self.device), mask.to(self.device)).float().cpu())
        return torch.cat(chunks).clone()


def open_model(checkpoint: str, device: str) -> UsedModel:
    """Load a model file to use it. Raises `UserError`."""
    where = pick_device(device)
    loaded = load_checkpoint(checkpoint)
    use_fast_matmul()
    return UsedModel(loaded.model.to(where), loaded.data, where)
