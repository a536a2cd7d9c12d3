"""Dense Vision Transformers of the same compute: a block with this project's attention, timm's block, timm's model.

Shapes: B batch, N tokens, D width, K experts chosen for a token.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.config import ModelConfig
from diffmoe.model.layers import Attention, Expert
from diffmoe.model.sequence import TokenSequence


def active_hidden(config: ModelConfig) -> int:
    """Hidden units that a token meets in a block of the image tower: global, vision and K routed experts'."""
    own = config.num_modality_specific_experts >= 1
    return (1 + own + config.top_k) * round(config.expansion_factor * config.embed_dim)


class VitBlock(nn.Module):
    """ViT's pre-norm block with this project's attention, its MLP as wide as a MoE block's active experts together.

    Both compute the same number of FLOPs but for the router's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attention = Attention(config.embed_dim, config.num_heads, config.dropout, config.attention)
        ratio = active_hidden(config) / config.embed_dim
        self.mlp = Expert(config.embed_dim, ratio, config.activation, config.dropout, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attention(TokenSequence(self.attention_norm(x)))[0]
        return x + self.mlp(x)


def timm_block(config: ModelConfig) -> Block:
    """The ViT block of timm with the same width, heads and hidden units."""
    return Block(config.embed_dim, config.num_heads, _mlp_ratio(active_hidden(config), config), qkv_bias=True)


def timm_classifier(config: ModelConfig, flops: float) -> VisionTransformer:
    """The ViT of timm on the same pictures, patches, width and heads that takes so many forward FLOPs a picture.

    As many blocks as come nearest with the MoE blocks' active hidden units; then as many hidden units as bring the
    FLOPs to those asked for.
    """
    hidden = active_hidden(config)
    without, one, wider = (
        picture_flops(_timm_vit(config, depth, units), config)
        for depth, units in ((0, hidden), (1, hidden), (1, 2 * hidden))
    )
    depth = max(1, round((flops - without) / (one - without)))
    missing = flops - without - depth * (one - without)
    return _timm_vit(config, depth, max(1, round(hidden * (1 + missing / (depth * (wider - one))))))


def _timm_vit(config: ModelConfig, depth: int, hidden: int) -> VisionTransformer:
    return VisionTransformer(
        img_size=config.img_size,
        patch_size=config.patch_size,
        in_chans=config.in_channels,
        num_classes=config.num_classes,
        global_pool="avg",
        class_token=False,
        embed_dim=config.embed_dim,
        depth=depth,
        num_heads=config.num_heads,
        mlp_ratio=_mlp_ratio(hidden, config),
    )


def _mlp_ratio(hidden: int, config: ModelConfig) -> float:
    return (hidden + 0.5) / config.embed_dim  # timm rounds the product down


def picture_flops(model: nn.Module, config: ModelConfig) -> float:
    """Forward FLOPs of one more picture in a batch."""
    pictures = torch.zeros(2, config.in_channels, config.img_size, config.img_size)
    return count_flops(model, pictures) - count_flops(model, pictures[:1])


@torch.no_grad()
def count_flops(model: nn.Module, *inputs: Any) -> float:
    """FLOPs of a forward pass: two for each multiply-add of a product or a convolution, nothing else."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()
