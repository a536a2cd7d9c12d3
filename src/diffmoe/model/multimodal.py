"""The whole model: embeddings, two towers, the fusion, the auxiliary losses.

Shapes: B pictures, U texts, N image tokens, T text tokens, D width, V vocabulary, C channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe import losses
from diffmoe.config import ModelConfig
from diffmoe.model.encoders import CrossModalFusion, Encoded, ImageEncoder, TextEncoder, UnifiedModalEncoder
from diffmoe.model.gather import gather_rows, world_size
from diffmoe.model.layers import full_precision, widened
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.outputs import ImageFeatures, Losses, Output, TextFeatures
from diffmoe.model.patch_embed import PatchEmbed
from diffmoe.model.routers import Router
from diffmoe.model.routing import Routing
from diffmoe.model.sequence import CaptionCache, Context, KeyValues, TokenSequence

IMAGE, TEXT = 0, 1
MAX_SCALE = math.log(100)
"""Ceiling of the contrastive temperature's logarithm (CLIP, Radford et al. 2021, section 2.5)."""


class MultiModalMoE(nn.Module):
    """Dual encoder + fusion encoder, every block a Mixture of Experts.

        model = MultiModalMoE(ModelConfig(img_size=32, in_channels=3))
        out = model(images)                              # (B, C, H, W) float, normalised
        out = model(images, text_tokens, attention_mask) # one text a picture: (B, T) int64; mask 1 = real token
        out["embedding"]                                 # (B, D)

    Args:
        config: the architecture and the weights of the losses.
        text_router: of the text tower and the fusion, where it is another one than the image tower's.
    """

    def __init__(self, config: ModelConfig, text_router: str | None = None) -> None:
        super().__init__()
        self.config = config
        width, eps = config.embed_dim, config.layer_norm_eps
        self.patch_embed = PatchEmbed(
            config.img_size, config.patch_size, config.in_channels, width, config.patch_embed, config.stem_width
        )
        self.image_position = nn.Parameter(torch.zeros(1, config.num_patches, width))
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_embed_dim)
        self.token_projection = nn.Linear(config.text_embed_dim, width)
        self.text_position = nn.Parameter(torch.zeros(config.max_text_len, width))
        self.modality_embedding = nn.Parameter(torch.zeros(2, width))
        self.image_encoder = ImageEncoder(config)
        of_text = config if text_router is None else dataclasses.replace(config, router=text_router)
        self.text_encoder = TextEncoder(of_text)
        self.image_norm = nn.LayerNorm(width, eps=eps)
        self.text_norm = nn.LayerNorm(width, eps=eps)
        self.image_projection = nn.Linear(width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.fusion = CrossModalFusion(of_text) if config.fusion_layers else None
        self.fusion_norm = nn.LayerNorm(width, eps=eps) if config.fusion_layers else None
        init_weights(self, config.initializer_range)

    @property
    def scale(self) -> Tensor:
        """Inverse temperature of the contrastive loss, at most 100."""
        # The gradient passes the ceiling, so that a temperature that has reached it can come down again.
        excess = (self.log_scale - MAX_SCALE).clamp(min=0).detach()
        return (self.log_scale - excess).exp()

    def image_features(self, images: Tensor, need_weights: bool = False) -> ImageFeatures:
        """(B, C, H, W) normalised pictures, of any size that the patch divides, through the image tower."""
        x = self.patch_embed(images) + self._image_position(images) + self.modality_embedding[IMAGE]
        encoded: Encoded = self.image_encoder(TokenSequence(x), need_weights)
        features = self.image_norm(encoded.features)
        pooled = features.mean(1)
        embedding = _project(pooled, self.image_projection)
        return ImageFeatures(features, pooled, embedding, encoded.routing, encoded.attention)

    def text_features(
        self, text_tokens: Tensor, attention_mask: Tensor | None = None, need_weights: bool = False
    ) -> TextFeatures:
        """(U, T) int64 tokens and their mask (1 = real, on the left) through the text tower."""
        mask = torch.ones_like(text_tokens) if attention_mask is None else attention_mask
        encoded = self.read_tokens(text_tokens, mask.bool(), need_weights)
        features = encoded.features
        last = mask.long().sum(-1) - 1
        pooled = features[torch.arange(len(last), device=last.device), last]
        weight = mask.to(features)[..., None]
        tokens = text_tokens.masked_fill(~mask.bool(), -1)
        return TextFeatures(
            tokens,
            features,
            mask.bool(),
            (features * weight).sum(1) / weight.sum(1),
            pooled,
            _project(pooled, self.text_projection),
            losses.first_occurrence(tokens),
            encoded.routing,
            encoded.attention,
        )

    def read_tokens(
        self,
        text_tokens: Tensor,
        mask: Tensor | None = None,
        need_weights: bool = False,
        cache: CaptionCache | None = None,
    ) -> Encoded:
        """(U, T) int64 tokens through the text tower; with a cache, the tokens after those that it holds.

        Raises `ValueError` where the text becomes longer than max_text_len.
        """
        start = 0 if cache is None else cache.length
        end = start + text_tokens.shape[1]
        if end > self.config.max_text_len:
            raise ValueError(f"a text of {end} tokens is over max_text_len ({self.config.max_text_len})")
        x = self.token_projection(self.token_embedding(text_tokens))
        x = x + self.text_position[start:end] + self.modality_embedding[TEXT]
        past = None if cache is None else cache.text
        encoded: Encoded = self.text_encoder(TokenSequence(x, mask, causal=True, past=past), need_weights)
        return dataclasses.replace(encoded, features=self.text_norm(encoded.features))

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised pictures -> (B, D) unit-norm embeddings, comparable with `encode_text`'s."""
        return self.image_features(images).embedding

    def encode_text(self, text_tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(U, T) int64 tokens and their mask -> (U, D) unit-norm embeddings, comparable with `encode_image`'s."""
        return self.text_features(text_tokens, attention_mask).embedding

    def fuse(self, query: TokenSequence, context: Context, need_weights: bool = False) -> Encoded:
        """One modality, `query` (B, N, D), reads the other, `context` (B, S, D): as `CrossModalFusion`, normalised.

        Raises `ValueError` where fusion_layers is 0.
        """
        fusion, norm = self._fusion()
        encoded: Encoded = fusion(query, context, need_weights)
        return dataclasses.replace(encoded, features=norm(encoded.features))

    def caption_cache(self, image_features: Tensor) -> CaptionCache:
        """An empty cache for captions of these pictures (B, N, D), whose keys and values are computed here, once."""
        fusion, _ = self._fusion()
        max_len = self.config.max_text_len
        return CaptionCache(
            [KeyValues(max_len) for _ in self.text_encoder.blocks],
            [KeyValues(max_len) for _ in fusion.layers],
            fusion.prepare(image_features),
        )

    def _fusion(self) -> tuple[CrossModalFusion, nn.LayerNorm]:
        if self.fusion is None or self.fusion_norm is None:
            raise ValueError("fusion_layers is 0: this model has no fusion")
        return self.fusion, self.fusion_norm

    def forward(
        self,
        images: Tensor,
        text_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> dict[str, Any]:
        """Pictures alone, or each with its own text.

        Args:
            images: (B, C, H, W) float, normalised.
            text_tokens: (B, T) int64, row b the text of picture b.
            attention_mask: (B, T), 1 at real tokens; None when all are.
            need_weights: also return the attention maps, as `attention`.

        Returns:
            embedding (B, D), image_features (B, N, D), text_features (B, T, D) and fused_features (B, N, D) (None
            without text), routing (a tuple, one a block), router_loss (the weighted sum) and its parts.
        """
        return self.encode(images, text_tokens, attention_mask, need_weights).as_dict()

    def encode(
        self,
        images: Tensor,
        text_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Output:
        """As `forward`, typed."""
        image = self.image_features(images, need_weights)
        if text_tokens is None:
            return Output(embedding=image.pooled, image=image, losses=self.losses(image.routing, image))
        text = self.text_features(text_tokens, attention_mask, need_weights)
        routing, fused, embedding = image.routing + text.routing, None, image.pooled
        if self.fusion is not None:
            fused = self.fuse(TokenSequence(image.features), Context(text.features, text.mask), need_weights)
            routing, embedding = routing + fused.routing, fused.features.mean(1)
        own = self.losses(routing, image, text, paired=True)
        return Output(embedding=embedding, image=image, text=text, fused=fused, losses=own)

    def losses(
        self,
        routing: tuple[Routing, ...],
        image: ImageFeatures,
        text: TextFeatures | None = None,
        text_of_image: Tensor | None = None,
        paired: bool = False,
    ) -> Losses:
        """The model's own losses, in float32 whatever autocast says.

        Args:
            routing: of all blocks that ran.
            image: B pictures.
            text: U texts; None leaves the two cross-modal losses at 0.
            text_of_image: (B,) int64, the row of `text` that describes each picture; None: as without texts.
            paired: instead, text b is picture b's own, and in training a picture is told from the texts of all
                processes.
        """
        config = self.config
        with full_precision(image.features):
            z_loss, balance, others = self._routing_losses(routing, widened(image.pooled.new_zeros(())))
            alignment = contrastive = torch.zeros_like(z_loss)
            if text is not None and paired:
                alignment = losses.cross_modal_alignment_loss(widened(image.pooled), widened(text.mean))
                contrastive = self._contrast_pairs(image, text)
            elif text is not None and text_of_image is not None:
                described = widened(text.mean)[text_of_image]
                alignment = losses.cross_modal_alignment_loss(widened(image.pooled), described)
                contrastive = losses.contrastive_loss(
                    image.embedding, text.embedding, text.first[text_of_image], self.scale, _is_first(text.first)
                )
            total = (
                config.router_z_loss_weight * z_loss
                + config.router_balance_loss_weight * balance
                + config.cross_modal_alignment_weight * alignment
                + config.contrastive_loss_weight * contrastive
                + others
            )
        return Losses(total, z_loss, balance, alignment, contrastive)

    def _contrast_pairs(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """The contrastive loss where text b is picture b's own, over the batches of all processes in training."""
        images, texts, first = image.embedding, text.embedding, text.first
        if self.training and world_size() > 1:
            tokens = F.pad(text.tokens, (0, self.config.max_text_len - text.tokens.shape[1]), value=-1)
            images, texts, tokens = gather_rows(images, texts, tokens)
            first = losses.first_occurrence(tokens)
        return losses.contrastive_loss(images, texts, first, self.scale, _is_first(first))

    def _routing_losses(self, routings: tuple[Routing, ...], zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summed over blocks: z-loss, balance loss, and the weighted sum of those that are off by default."""
        z_loss = sum((losses.router_z_loss(r.probs, r.mask) for r in routings), zero)
        balance = sum((losses.load_balance_loss(r.probs, r.tokens_per_expert, r.mask) for r in routings), zero)
        optional = {
            "router_logit_z_loss_weight": lambda r: losses.router_logit_z_loss(r.logits, r.mask),
            "switch_loss_weight": lambda r: losses.switch_loss(r.probs, r.tokens_per_expert, r.mask),
            "entropy_local_weight": lambda r: losses.local_entropy_loss(r.probs, r.mask),
            "entropy_global_weight": lambda r: losses.global_entropy_loss(r.probs, r.mask),
        }
        others = zero
        for name, loss in optional.items():
            if (weight := getattr(self.config, name)) > 0:
                others = others + weight * sum((loss(r) for r in routings), zero)
        return z_loss, balance, others

    def routers(self) -> dict[str, Router]:
        """The router of each routed block, by `<place>_<layer>`."""
        return {
            f"{block.place}_{block.layer}": block.general_experts.router
            for block in self.modules()
            if isinstance(block, UnifiedModalEncoder) and isinstance(block.general_experts, GeneralExperts)
        }

    def _image_position(self, images: Tensor) -> Tensor:
        """The position embedding (1, N, D), interpolated where the pictures are not of img_size."""
        height, width = (side // self.config.patch_size for side in images.shape[-2:])
        grid = self.patch_embed.grid_size
        if (height, width) == (grid, grid):
            return self.image_position
        position = self.image_position.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        position = F.interpolate(position, size=(height, width), mode="bicubic", antialias=True)
        return position.flatten(2).transpose(1, 2)


def _project(pooled: Tensor, projection: nn.Linear) -> Tensor:
    """(B, D) -> unit norm in the shared space, in float32: bfloat16 would make ties of what differs."""
    with full_precision(pooled):
        return F.normalize(projection(widened(pooled)), dim=-1)


def _is_first(first: Tensor) -> Tensor:
    """(U,) bool, False at texts that repeat another one."""
    return first == torch.arange(len(first), device=first.device)


def init_weights(model: nn.Module, std: float) -> None:
    """Normal weights of the given standard deviation, zero biases; routers keep an initialisation of their own."""
    routers = {id(part) for m in model.modules() if isinstance(m, Router) for part in m.modules()}
    for module in model.modules():
        if id(module) in routers:
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, GeneralExperts):
            module.reset_parameters(std)
        if isinstance(module, MultiModalMoE):
            nn.init.normal_(module.image_position, std=module.config.position_range)
            for parameter in (module.text_position, module.modality_embedding):
                nn.init.normal_(parameter, std=std)
