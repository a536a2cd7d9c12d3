"""What a user would take instead: a plain CNN, and timm's Vision Transformer, as heads that the same loop trains.

They tell classes from the picture alone: no text, no routing. `ModelConfig.architecture` names one, and of the other
fields they read what is theirs: a CNN's width is `embed_dim` and that of its third stage `expansion_factor` times it;
of the transformer width, heads, depth and expansion are those of the image tower.

Shapes: B pictures, C channels, N places of the last feature map or tokens, W width of the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import ModelConfig, UserError
from diffmoe.model.heads import Classifier
from diffmoe.model.layers import full_precision, widened
from diffmoe.model.outputs import ClassifierOutput, ImageFeatures, Losses, TextFeatures
from diffmoe.model.patch_embed import ConvNorm, PatchEmbed, StemConv


class Baseline(Classifier):
    """A linear head on the mean of a network's features.

    Args:
        config: the model's; `architecture` is not moe.

    Raises:
        UserError: for timm, where it is not installed.
    """

    kind = "baseline"
    decides_in = frozenset()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        network, width = NETWORKS[config.architecture](config)
        self.backbone = network  # pyright: ignore[reportIncompatibleVariableOverride] - it has no towers
        self.head = nn.Linear(width, config.num_classes)
        nn.init.normal_(self.head.weight, std=config.initializer_range)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def restore(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> Self:
        return cls(config)

    def like(self, config: ModelConfig) -> Self:
        return type(self)(config)

    def run(
        self,
        batch: Sequence[Tensor],
        *,
        classes: TextFeatures | None = None,
        need_weights: bool = False,
        need_losses: bool = False,
    ) -> ClassifierOutput:
        """Pictures (B, C, H, W); there are no attention maps to return, and no losses of its own but zeros."""
        features = self.backbone(batch[0])
        pooled = features.mean(1)
        with full_precision(pooled):
            logits = self.head(widened(pooled))
            image = ImageFeatures(features, pooled, F.normalize(widened(pooled), dim=-1))
        losses = Losses(*(logits.new_zeros(()) for _ in range(5))) if need_losses else None
        return ClassifierOutput(embedding=pooled, image=image, logits=logits, losses=losses)


class ThreeStages(nn.Module):
    """The stem that brings a patch to one pixel, and a stage after it: (B, C, H, W) -> (B, N, W).

    After a `whitened` stem it is another stage of its kind, which halves the picture once more; else a convolution, the
    second of the stage that a `conv` stem begins with its last one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width_in, width, kind = config.embed_dim, third_width(config), config.patch_embed
        self.patch_embed = PatchEmbed(
            config.img_size, config.patch_size, config.in_channels, width_in, kind, config.stem_width
        )
        fast = (StemConv(width_in, width, pool=True), StemConv(width, width))
        self.stage = nn.Sequential(*(fast if kind == "whitened" else (ConvNorm(width_in, width),)))

    def forward(self, images: Tensor) -> Tensor:
        side = images.shape[-1] // self.patch_embed.patch_size
        tokens = self.patch_embed(images)
        features = self.stage(tokens.transpose(1, 2).unflatten(2, (-1, side)))
        return features.flatten(2).transpose(1, 2)


def third_width(config: ModelConfig) -> int:
    """Channels of the third stage."""
    return round(config.expansion_factor * config.embed_dim)


class TimmTokens(nn.Module):
    """timm's VisionTransformer up to its last norm: (B, C, H, W) -> (B, N, W)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError as error:
            raise UserError("timm is not installed: pip install 'diff-moe[bench]'") from error
        self.vit = VisionTransformer(
            img_size=config.img_size,
            patch_size=config.patch_size,
            in_chans=config.in_channels,
            num_classes=0,
            global_pool="",
            class_token=False,
            embed_dim=config.embed_dim,
            depth=config.img_encoder_layers,
            num_heads=config.num_heads,
            mlp_ratio=(round(config.expansion_factor * config.embed_dim) + 0.5) / config.embed_dim,  # it rounds down
            proj_drop_rate=config.dropout,
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)


NETWORKS = {
    "cnn": lambda config: (ThreeStages(config), third_width(config)),
    "timm": lambda config: (TimmTokens(config), config.embed_dim),
}
"""By `ModelConfig.architecture`: the network, and the width of its features."""
