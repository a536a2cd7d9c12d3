"""MoE Transformer blocks, stacked into the two towers and the fusion.

Shapes: B batch, N tokens of the sequence itself, S tokens of the context, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffmoe.config import ModelConfig
from diffmoe.model.layers import Attention, Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routing import Routing, at
from diffmoe.model.sequence import Context, TokenSequence

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


BlockOutput = tuple[Tensor, Routing | None, tuple[AttentionMap, ...]]
"""What a layer returns: the sequence, where its tokens were sent (None where dense), attention maps if asked for."""


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
        width = config.embed_dim
        self.global_expert = Expert(width, config.expansion_factor, **shared)
        experts_before = {"image": 0, "text": 1, "fusion": 2}[place]  # vision comes first, then text
        has_own = config.num_modality_specific_experts > experts_before
        self.modality_expert = Expert(width, config.modality_expansion, **shared) if has_own else None
        self.dense_scale = config.dense_scale
        if config.dense:
            self.general_experts = Expert(width, config.dense_hidden / width, **shared)
        else:
            self.general_experts = GeneralExperts(
                width,
                config.num_general_experts,
                config.top_k,
                config.routed_expansion,
                router=config.router,
                router_noise=config.router_noise,
                backend=config.expert_backend,
                gate=config.gate,
                gate_scale=config.gate_scale,
                **shared,
            )

    def forward(self, sequence: TokenSequence, need_weights: bool = False) -> BlockOutput:
        """One block: (B, N, D); the `Routing`, None where dense; the attention map, none where not asked for."""
        past = None if sequence.past is None else sequence.past[self.layer]
        attended, weights = self.attention(sequence.at(self.attention_norm(sequence.tokens)), past, need_weights)
        x = sequence.tokens + attended
        if isinstance(self.general_experts, GeneralExperts):
            routed, routing = self.general_experts(x, sequence.mask)
            routing = at(routing, self.place, self.layer)
        else:
            routed, routing = self.general_experts(x), None
            if self.dense_scale != 1:
                routed = routed * self.dense_scale
        out = x + self.global_expert(x) + routed
        if self.modality_expert is not None:
            out = out + self.modality_expert(x)
        maps = () if weights is None else (AttentionMap(weights, self.place, self.layer),)
        return out, routing, maps


def _through(layers: nn.ModuleList, sequence: TokenSequence, *args: Any, recomputed: bool) -> Encoded:
    """The sequence through one layer after another, each called with (sequence, *args); `recomputed` going backward."""
    routings: list[Routing] = []
    maps: list[AttentionMap] = []
    for layer in layers:
        if recomputed:
            x, routing, attention = checkpoint(layer, sequence, *args, use_reentrant=False)
        else:
            x, routing, attention = layer(sequence, *args)
        sequence = sequence.at(x)
        routings += [] if routing is None else [routing]
        maps += attention
    return Encoded(sequence.tokens, tuple(routings), tuple(maps))


class _Tower(nn.Module):
    """A stack of blocks of one place."""

    def __init__(self, config: ModelConfig, place: Place, num_layers: int) -> None:
        super().__init__()
        self.checkpointing = config.use_gradient_checkpointing
        self.blocks = nn.ModuleList(UnifiedModalEncoder(config, place, layer) for layer in range(num_layers))

    def forward(self, sequence: TokenSequence, need_weights: bool = False) -> Encoded:
        """Through all blocks; with a past, the tokens are those that come after it."""
        return _through(self.blocks, sequence, need_weights, recomputed=self.checkpointing and self.training)


class ImageEncoder(_Tower):
    """Image tower: a stack of blocks over patch tokens, each of which sees all others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, "image", config.img_encoder_layers)


class TextEncoder(_Tower):
    """Text tower: a stack of blocks for causal sequences, as in CLIP and CoCa: it serves contrast and captioning."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, "text", config.text_encoder_layers)


class FusionLayer(nn.Module):
    """Cross-attention of a sequence on its context, then a block without a modality expert."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.cross_attention = Attention(config.embed_dim, config.num_heads, config.dropout, config.attention)
        self.block = UnifiedModalEncoder(config, "fusion", layer)

    def context_keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What the cross-attention needs of its context (B, S, D), whatever the query: (B, H, S, D / H) each."""
        return self.cross_attention.keys_values(self.context_norm(context))

    def forward(self, query: TokenSequence, context: Context, need_weights: bool = False) -> BlockOutput:
        """(B, N, D) on (B, S, D) -> (B, N, D), `Routing`, maps of the cross- and the self-attention."""
        keys_values = context.keys_values
        keys, values = (
            self.context_keys_values(context.tokens) if keys_values is None else keys_values[self.block.layer]
        )
        allowed = None if context.mask is None else context.mask[:, None, None, :].bool()
        # Neighbouring rows of the query may share one row of the context: nothing is causal here, so they are one row.
        tokens = query.tokens
        normed, num_contexts = self.query_norm(tokens), len(keys)
        if len(tokens) != num_contexts:
            normed = normed.reshape(num_contexts, -1, tokens.shape[-1])
        attended, weights = self.cross_attention.attend(normed, keys, values, allowed, need_weights)
        x, routing, maps = self.block(query.at(tokens + attended.view_as(tokens)), need_weights)
        if weights is not None:
            maps = (AttentionMap(weights, "fusion", self.block.layer, cross=True), *maps)
        return x, routing, maps


class CrossModalFusion(nn.Module):
    """Fusion encoder: layers in which `query` (one modality) reads `context` (the other).

    Pictures read text for classification and matching; text reads pictures, causally, for captioning.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.checkpointing = config.use_gradient_checkpointing
        self.layers = nn.ModuleList(FusionLayer(config, layer) for layer in range(config.fusion_layers))

    def prepare(self, context: Tensor) -> Context:
        """A context (B, S, D) that is read again and again: with what each layer's cross-attention needs of it."""
        layers = [layer for layer in self.layers if isinstance(layer, FusionLayer)]
        pairs = [layer.context_keys_values(context) for layer in layers]
        # In one piece each, or every product would copy them first.
        return Context(context, None, [(keys.contiguous(), values.contiguous()) for keys, values in pairs])

    def forward(self, query: TokenSequence, context: Context, need_weights: bool = False) -> Encoded:
        """The query, which comes out, reads the context, all of whose tokens it sees."""
        return _through(self.layers, query, context, need_weights, recomputed=self.checkpointing and self.training)
