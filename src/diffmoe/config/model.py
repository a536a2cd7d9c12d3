"""The model's settings."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from dataclasses import dataclass
from typing import Literal

from diffmoe.config.errors import check, check_at_least, check_fraction, check_limits

START_ID, END_ID = 49406, 49407
"""The CLIP tokenizer's special tokens, the last ids of its table."""
VOCAB_SIZE = 49408
"""Tokens that it has."""
LARGEST_MODEL = {
    **{"img_size": 4096, "in_channels": 1024, "expansion_factor": 1024, "layer_norm_eps": 1, "vocab_size": 10_000_000},
    **dict.fromkeys(("embed_dim", "text_embed_dim", "num_general_experts", "max_text_len"), 65_536),
    **dict.fromkeys(("modality_expansion_factor", "routed_expansion_factor"), 1024),
    **dict.fromkeys(("img_encoder_layers", "text_encoder_layers", "fusion_layers"), 1000),
}
"""Over it no model could be built or learn; a number that is not named here is a million at most."""

GATE_DRAWS = 2000
"""Tokens by which the loudness of a fresh router's gates is estimated: to half a percent."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model. The defaults are the preset `base`."""

    architecture: Literal["moe", "cnn", "timm"] = "moe"
    """What the model is: 'moe', the one that all of this is about; or a baseline beside it, which tells classes from
    the picture alone: 'cnn', patch_embed and a third stage of convolutions; 'timm', timm's VisionTransformer."""
    img_size: int = 28
    """Height and width of the pictures, in pixels."""
    patch_size: int = 4
    """Height and width of a patch, in pixels; it must divide img_size."""
    in_channels: int = 1
    """Channels of the pictures: 1 grey, 3 colour."""
    patch_embed: Literal["linear", "conv", "whitened"] = "linear"
    """How a patch becomes a vector: 'linear' is ViT's one projection; 'conv' a stack of 3x3 convolutions (Xiao et al.
    2021), which learns far faster on small data; 'whitened' one behind a frozen whitening of the pictures (Jordan
    2024), which learns faster still."""
    stem_width: int = 64
    """Channels of patch_embed 'whitened' after the first of several halvings, embed_dim after the others."""
    embed_dim: int = 512
    """Width of every token, D; num_heads must divide it."""
    num_heads: int = 8
    """Attention heads of every block."""
    img_encoder_layers: int = 6
    """Blocks of the image tower."""
    text_encoder_layers: int = 4
    """Blocks of the text tower."""
    fusion_layers: int = 3
    """Layers of the cross-modal fusion; 0 leaves it out."""
    num_general_experts: int = 4
    """Experts in each block's routed pool, E."""
    num_modality_specific_experts: int = 2
    """How many modalities have an expert of their own: 0 none, 1 vision, 2 vision and text."""
    top_k: int = 2
    """Routed experts for each token, K."""
    expansion_factor: float = 4
    """Hidden width of the global expert over embed_dim, and of the others where nothing else is said."""
    modality_expansion_factor: float | None = None
    """Hidden width of the modality experts over embed_dim; None is expansion_factor."""
    routed_expansion_factor: float | None = None
    """Hidden width of each routed expert over embed_dim; None is expansion_factor. Smaller, with more experts and a
    larger top_k, is what fine-grained experts are (DeepSeekMoE)."""
    dense: bool = False
    """Replace each routed pool by one expert that is top_k times as wide: the same active compute, no routing."""
    dense_units: int | None = None
    """With dense, hidden units of that expert; None is top_k times a routed one's."""
    dense_scale: float = 1.0
    """With dense, what that expert's output is multiplied by."""
    router: str = "attentive"
    """Who decides which experts a token is sent to; a name of `diffmoe.model.routers.ROUTERS`."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """How a token's experts are weighted: 'softmax', they compete; 'sigmoid', each by itself (DeepSeek-V3)."""
    gate_scale: float = 1.0
    """What a token's gates add up to: 1 is the weighted mean of its experts, top_k about their sum, as loud as a dense
    layer of the same active width (with top_k 1, times the expert's probability)."""
    router_noise: bool = False
    """Learned noise on the router's scores in training (Shazeer et al. 2017, eq. 4)."""
    num_classes: int = 10
    """Classes of the head; taken from the dataset on the command line."""
    classify_with: Literal["image", "descriptions"] = "image"
    """What the class is read from: 'image', the picture alone; 'descriptions', the picture fused with the descriptions
    of all classes, the same for every picture."""
    dropout: float = 0.2
    """Dropout probability in the experts and after attention."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Activation of every expert."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    position_range: float = 0.02
    """Standard deviation of the initial positions of the patches: a larger one tells a model early where things are."""
    use_gradient_checkpointing: bool = True
    """Recompute each block in the backward pass: less memory, about a third more time."""
    expert_backend: Literal["auto", "sorted", "padded", "grouped", "masked"] = "auto"
    """How tokens get to their routed experts; 'auto' is the fastest by device, number format and number of tokens."""
    attention: Literal["auto", "explicit", "fused"] = "auto"
    """Attention kernel: 'explicit' softmax, torch's 'fused' one, or 'auto', by device and number of queries."""
    vocab_size: int = 50000
    """Rows of the text embedding; the CLIP tokenizer needs 49408."""
    max_text_len: int = 32
    """Longest text in tokens, start and end included."""
    text_embed_dim: int = 128
    """Width of the text embedding before it is projected to embed_dim."""
    router_z_loss_weight: float = 0.001
    """Weight of the router's z-loss, E * mean(p_e^2)."""
    router_balance_loss_weight: float = 0.01
    """Weight of the load-balancing loss, KL(load || uniform)."""
    cross_modal_alignment_weight: float = 0.1
    """Weight of the alignment loss, -cos(picture, text)."""
    contrastive_loss_weight: float = 0.1
    """Weight of the contrastive loss (InfoNCE)."""
    router_logit_z_loss_weight: float = 0.0
    """Weight of ST-MoE's z-loss on the router's logits, mean(logsumexp^2); off by default."""
    switch_loss_weight: float = 0.0
    """Weight of Switch Transformer's balance loss, E * sum(f_e * P_e); off by default."""
    entropy_local_weight: float = 0.0
    """Weight of LIMoE's local entropy loss, one for each modality; off by default."""
    entropy_global_weight: float = 0.0
    """Weight of LIMoE's global entropy loss, one for each modality; off by default."""
    router_guidance_weight: float = 0.0
    """Weight of the routers' guidance: -log of the probability that a picture goes to its super-class's expert, summed
    over the image tower's blocks (Mobile V-MoEs, Daxberger et al. 2023); off by default."""
    balance_bias_rate: float = 0.0
    """Step of the loss-free balancing bias (DeepSeek-V3); 0 is off."""

    def __post_init__(self) -> None:
        check_limits(self, **LARGEST_MODEL)
        check_at_least(self, 1, "img_size", "patch_size", "in_channels", "embed_dim", "num_heads", "img_encoder_layers")
        check_at_least(
            self,
            1,
            "stem_width",
            "text_encoder_layers",
            "num_general_experts",
            "top_k",
            "num_classes",
            "vocab_size",
            "text_embed_dim",
        )
        check_at_least(self, 0, "fusion_layers", "initializer_range", "position_range", "balance_bias_rate")
        check_at_least(self, 3, "max_text_len")
        check_fraction(self, "dropout")
        check(self.expansion_factor > 0, "expansion_factor", self.expansion_factor, "over 0")
        hidden = round(self.expansion_factor * self.embed_dim)
        check(hidden >= 1, "expansion_factor", self.expansion_factor, "at least 1 / embed_dim: one hidden unit")
        for name in ("modality_expansion_factor", "routed_expansion_factor"):
            factor = getattr(self, name)
            if factor is not None:
                check(factor > 0, name, factor, "over 0")
                check(round(factor * self.embed_dim) >= 1, name, factor, "at least 1 / embed_dim: one hidden unit")
        if self.dense_units is not None:
            check_at_least(self, 1, "dense_units")
        for name in ("gate_scale", "dense_scale"):
            check(getattr(self, name) > 0, name, getattr(self, name), "over 0")
        check(self.layer_norm_eps > 0, "layer_norm_eps", self.layer_norm_eps, "over 0")
        check(
            0 <= self.num_modality_specific_experts <= 2,
            "num_modality_specific_experts",
            self.num_modality_specific_experts,
            "0, 1 or 2",
        )
        check(
            self.embed_dim % self.num_heads == 0,
            "embed_dim",
            self.embed_dim,
            f"a multiple of num_heads ({self.num_heads})",
        )
        check(
            self.top_k <= self.num_general_experts,
            "top_k",
            self.top_k,
            f"at most num_general_experts ({self.num_general_experts})",
        )
        check(
            self.img_size % self.patch_size == 0,
            "img_size",
            self.img_size,
            f"a multiple of patch_size ({self.patch_size})",
        )
        if self.architecture != "moe":
            object.__setattr__(self, "dense", True)  # a baseline routes nothing
            check(self.classify_with == "image", "classify_with", self.classify_with, "'image' with a baseline")
        if self.architecture == "timm":  # which has a projection of its own, and nothing to whiten
            check(self.patch_embed != "whitened", "patch_embed", self.patch_embed, "'linear' with architecture 'timm'")
        power_of_two = self.patch_size & (self.patch_size - 1) == 0
        if self.patch_embed == "conv":
            check(power_of_two, "patch_size", self.patch_size, "a power of two with patch_embed 'conv'")
        if self.patch_embed == "whitened":
            halves = power_of_two and self.patch_size > 1
            check(halves, "patch_size", self.patch_size, "a power of two over 1 with patch_embed 'whitened'")
        if self.classify_with == "descriptions":
            check(
                self.fusion_layers > 0,
                "fusion_layers",
                self.fusion_layers,
                "at least 1 with classify_with 'descriptions'",
            )
        for field in dataclasses.fields(self):
            if field.name.endswith("_weight"):
                check_at_least(self, 0, field.name)

    @property
    def modality_expansion(self) -> float:
        """Hidden width of the modality experts over embed_dim."""
        return self.expansion_factor if self.modality_expansion_factor is None else self.modality_expansion_factor

    @property
    def routed_expansion(self) -> float:
        """Hidden width of each routed expert over embed_dim."""
        return self.expansion_factor if self.routed_expansion_factor is None else self.routed_expansion_factor

    @property
    def dense_hidden(self) -> int:
        """With dense, hidden units of the expert in the pool's place."""
        return self.dense_units or self.top_k * round(self.routed_expansion * self.embed_dim)

    def dense_twin(self) -> ModelConfig:
        """The same without routing: one expert in each pool's place, of the same FLOPs a picture and equally loud.

        FLOPs are the image tower's, where N is num_patches: what the router and the mixing cost is given to the
        twin as hidden units, to the nearest whole one. Loudness is the branch's standard deviation at initialisation:
        that of a sum of K unlike experts weighted with a fresh router's gates, over that of one K times as wide.
        """
        units = max(1, round(_routed_units(self)))
        loudness = self.gate_scale * _gates_norm(self) / math.sqrt(self.top_k)
        unrouted = dataclasses.replace(self, router_guidance_weight=0.0)  # there is no router to guide
        return dataclasses.replace(unrouted, dense=True, dense_units=units, dense_scale=loudness)

    @property
    def num_patches(self) -> int:
        """Image tokens of a picture of img_size, N."""
        return (self.img_size // self.patch_size) ** 2


def _routed_units(config: ModelConfig) -> float:
    """Hidden units of a dense FFN that costs as many FLOPs a token as the routed pool: 4 D each."""
    experts, hidden = config.num_general_experts, round(config.routed_expansion * config.embed_dim)
    tokens, scoring = config.num_patches, experts / 2  # a logit is 2 D FLOPs
    slots = 4 * config.top_k * experts
    by_router = {
        "picture": config.top_k * hidden + scoring / tokens,
        "merged": hidden + (experts * hidden + scoring) / tokens,  # the experts' weights are averaged once a picture
        "soft": slots / tokens * hidden + slots / 2 + slots,  # scored, averaged before and averaged after
        "hash": config.top_k * hidden,
        "random": config.top_k * hidden,
    }
    return by_router.get(config.router, config.top_k * hidden + scoring)


@functools.cache
def _gates_norm(config: ModelConfig) -> float:
    """Root of the mean sum of squares of a fresh router's gates, whose logits are standard normal; gate_scale apart."""
    if config.router == "merged":
        return math.sqrt(config.top_k)  # one expert, copies of which are averaged
    if config.router in ("hash", "random"):
        return 1 / math.sqrt(config.top_k)
    draw = random.Random(0)
    total = 0.0
    for _ in range(GATE_DRAWS):
        logits = sorted((draw.gauss(0, 1) for _ in range(config.num_general_experts)), reverse=True)
        scores = [1 / (1 + math.exp(-x)) if config.gate == "sigmoid" else math.exp(x) for x in logits]
        chosen = scores[: config.top_k]
        is_share = config.top_k > 1 and config.router != "expert_choice"  # else the score itself
        whole = sum(chosen) if is_share else 1 if config.gate == "sigmoid" else sum(scores)
        total += sum((score / whole) ** 2 for score in chosen)
    return math.sqrt(total / GATE_DRAWS)
