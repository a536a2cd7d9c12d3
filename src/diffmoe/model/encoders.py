"""MoE Transformer blocks, stacked into the two towers and the fusion.

Shapes: B batch, N tokens of the sequence itself, S tokens of the context, D width, H heads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffmoe.config import ModelConfig
from diffmoe.model.layers import Attention, Expert
from diffmoe.model.moe import GeneralExperts, Routing

Place = Literal["image", "text", "fusion"]


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights of one block, kept only on request."""

    weights: Tensor
    """(B, H, N, S), each row sums to 1."""
    place: Place
    """image, text or fusion (there: the sequence on itself) or cross (the sequence on its context)."""
    layer: int
    cross: bool = False


@dataclass(frozen=True)
class Encoded:
    """A sequence after a stack of blocks, with what happened on the way."""

    features: Tensor
    """(B, N, D)."""
    routing: tuple[Routing, ...] = ()
    """One a block; empty where the model is dense."""
    attention: tuple[AttentionMap, ...] = ()
    """Empty unless asked for."""


class UnifiedModalEncoder(nn.Module):
    """MoE Transformer block: `x + attention(LN(x))`, then `x + global(x) + modality(x) + routed(x)`.

    The global expert sees every token; the modality expert is the one of the block's place (none in the fusion); the
    routed pool gives each token its top-k experts. With `config.dense` the pool is one expert, top_k times as wide.

    Args:
        config: the model's.
        place: where the block sits: image, text or fusion.
        layer: its number there, from 0.
    """

    def __init__(self, config: ModelConfig, place: Place, layer: int = 0) -> None:
        super().__init__()
        self.place: Place = place
        self.layer = layer
        shared = {"activation": config.activation, "dropout": config.dropout, "layer_norm_eps": config.layer_norm_eps}
        self.attention_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attention = Attention(config.embed_dim, config.num_heads, config.dropout, config.attention)
        self.global_expert = Expert(config.embed_dim, config.expansion_factor, **shared)
        experts_before = {"image": 0, "text": 1, "fusion": 2}[place]  # vision comes first, then text
        has_own = config.num_modality_specific_experts > experts_before
        self.modality_expert = Expert(config.embed_dim, config.expansion_factor, **shared) if has_own else None
        if config.dense:
            width = config.top_k * round(config.expansion_factor * config.embed_dim)
            self.general_experts = Expert(config.embed_dim, width / config.embed_dim, **shared)
        else:
            self.general_experts = GeneralExperts(
                config.embed_dim,
                config.num_general_experts,
                config.top_k,
                config.expansion_factor,
                router_noise=config.router_noise,
                backend=config.expert_backend,
                **shared,
            )

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, need_weights: bool = False
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        """One block.

        Args:
            x: (B, N, D).
            mask: (B, N) bool, True at real tokens.
            causal: a token sees itself and the past only.
            need_weights: also return the attention weights.

        Returns:
            (B, N, D); the `Routing`, None where dense; the weights (B, H, N, N), None where not asked for.
        """
        attended, weights = self.attention(self.attention_norm(x), mask=mask, causal=causal, need_weights=need_weights)
        x = x + attended
        if isinstance(self.general_experts, GeneralExperts):
            routed, routing = self.general_experts(x, mask)
            routing = dataclasses.replace(routing, place=self.place, layer=self.layer)
        else:
            routed, routing = self.general_experts(x), None
        out = x + self.global_expert(x) + routed
        if self.modality_expert is not None:
            out = out + self.modality_expert(x)
        return out, routing, weights


class _Tower(nn.Module):
    """A stack of blocks of one place, with gradient checkpointing where the config asks for it."""

    def __init__(self, config: ModelConfig, place: Place, num_layers: int, causal: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UnifiedModalEncoder(config, place, layer) for layer in range(num_layers))
        self.place: Place = place
        self.causal = causal
        self.use_gradient_checkpointing = config.use_gradient_checkpointing

    def forward(self, x: Tensor, mask: Tensor | None = None, need_weights: bool = False) -> Encoded:
        """(B, N, D), and mask (B, N) True at real tokens -> `Encoded`."""
        routings: list[Routing] = []
        maps: list[AttentionMap] = []
        for layer, block in enumerate(self.blocks):
            if self.use_gradient_checkpointing and self.training:
                x, routing, weights = checkpoint(block, x, mask, self.causal, need_weights, use_reentrant=False)
            else:
                x, routing, weights = block(x, mask, self.causal, need_weights)
            if routing is not None:
                routings.append(routing)
            if weights is not None:
                maps.append(AttentionMap(weights, self.place, layer))
        return Encoded(x, tuple(routings), tuple(maps))


class ImageEncoder(_Tower):
    """Image tower: a stack of blocks over patch tokens, each of which sees all others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, "image", config.img_encoder_layers, causal=False)


class TextEncoder(_Tower):
    """Text tower: a stack of causal blocks, as in CLIP and CoCa, so that it serves contrast and captioning alike."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, "text", config.text_encoder_layers, causal=True)


class FusionLayer(nn.Module):
    """Cross-attention of a sequence on its context, then a block without a modality expert."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.cross_attention = Attention(config.embed_dim, config.num_heads, config.dropout, config.attention)
        self.block = UnifiedModalEncoder(config, "fusion", layer)

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        query_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        causal: bool = False,
        need_weights: bool = False,
    ) -> tuple[Tensor, Routing | None, Tensor | None, Tensor | None]:
        """(B, N, D) on (B, S, D) -> (B, N, D), `Routing`, self-attention and cross-attention weights."""
        attended, cross_weights = self.cross_attention(
            self.query_norm(query), self.context_norm(context), mask=context_mask, need_weights=need_weights
        )
        x, routing, weights = self.block(query + attended, query_mask, causal, need_weights)
        return x, routing, weights, cross_weights


class CrossModalFusion(nn.Module):
    """Fusion encoder: layers in which `query` (one modality) reads `context` (the other).

    Pictures read text for classification and matching; text reads pictures, causally, for captioning.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, layer) for layer in range(config.fusion_layers))
        self.use_gradient_checkpointing = config.use_gradient_checkpointing

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        query_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        causal: bool = False,
        need_weights: bool = False,
    ) -> Encoded:
        """Fuse.

        Args:
            query: (B, N, D), the sequence that comes out.
            context: (B, S, D), what it reads.
            query_mask: (B, N) bool, True at real tokens.
            context_mask: (B, S) bool, True at real tokens.
            causal: a query token sees only itself and the queries before it; it always sees the whole context.
            need_weights: also return the attention maps.
        """
        routings: list[Routing] = []
        maps: list[AttentionMap] = []
        x = query
        for number, layer in enumerate(self.layers):
            args = (x, context, query_mask, context_mask, causal, need_weights)
            if self.use_gradient_checkpointing and self.training:
                x, routing, weights, cross_weights = checkpoint(layer, *args, use_reentrant=False)
            else:
                x, routing, weights, cross_weights = layer(*args)
            if routing is not None:
                routings.append(routing)
            if need_weights:
                maps += [AttentionMap(cross_weights, "fusion", number, cross=True)]
                maps += [AttentionMap(weights, "fusion", number)]
        return Encoded(x, tuple(routings), tuple(maps))
