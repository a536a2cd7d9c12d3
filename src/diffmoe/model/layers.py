"""The parts that a block is made of: expert FFN, patch embedding, attention.

Shapes: B batch, N query tokens, S context tokens, D width, H heads, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.model.sequence import KeyValues, TokenSequence

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Within it autocast is off on the device of `x`: for routers and losses, which must not round to bfloat16."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def widened(x: Tensor) -> Tensor:
    """In float32 at least, for what must not round to bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dropout_layer(probability: float) -> nn.Module:
    """`nn.Dropout`, or nothing at all for 0: on a CPU even a dropout that drops nothing costs a pass over memory."""
    return nn.Dropout(probability) if probability > 0 else nn.Identity()


class Expert(nn.Module):
    """Expert FFN (pre-norm MLP): LayerNorm, Linear(D, e*D), activation, Dropout, Linear(e*D, D), Dropout.

    The residual connection is the caller's.

    Args:
        embed_dim: D.
        expansion_factor: e, hidden width over D.
        activation: gelu, relu or silu.
        dropout: probability, after the activation and at the end.
        layer_norm_eps: epsilon of the LayerNorm.
    """

    def __init__(
        self,
        embed_dim: int,
        expansion_factor: float = 4,
        activation: str = "gelu",
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = round(expansion_factor * embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.activation = ACTIVATIONS[activation]
        self.dropout1 = dropout_layer(dropout)
        self.fc2 = nn.Linear(hidden, embed_dim)
        self.dropout2 = dropout_layer(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = self.dropout1(self.activation(self.fc1(self.norm(x))))
        return self.dropout2(self.fc2(hidden))


class PatchEmbed(nn.Module):
    """Patch embedding: pictures to tokens, (B, C, H, W) -> (B, N, D).

    `linear` is ViT's Conv2d with kernel = stride = patch. `conv` is a convolutional stem (Xiao et al. 2021, "Early
    convolutions help transformers see better"): 3x3 convolutions with BatchNorm, halving the picture log2(patch)
    times; what a small model on a CPU needs to learn in minutes.

    Args:
        img_size: height and width the position embedding is made for; other sizes that the patch divides work too.
        patch_size: pixels a side; must divide the picture's height and width.
        in_channels: C.
        embed_dim: D.
        kind: linear or conv.
    """

    def __init__(
        self, img_size: int = 28, patch_size: int = 4, in_channels: int = 1, embed_dim: int = 512, kind: str = "linear"
    ) -> None:
        super().__init__()
        _check_divides(patch_size, img_size, img_size)
        self.patch_size = patch_size
        self.grid_size = img_size // patch_size
        self.num_patches = self.grid_size**2
        if kind == "conv":
            self.projection = _conv_stem(patch_size, in_channels, embed_dim)
        else:
            self.projection = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, N, D), N = (H / patch) * (W / patch), row by row."""
        _check_divides(self.patch_size, *images.shape[-2:])
        # Channels last: the convolutions run about twice as fast on a CPU, and the tokens come out contiguous.
        features = self.projection(images.contiguous(memory_format=torch.channels_last))
        return features.flatten(2).transpose(1, 2)


def _check_divides(patch_size: int, height: int, width: int) -> None:
    if height % patch_size or width % patch_size:
        raise ValueError(f"a picture of {height}x{width} cannot be cut into patches of {patch_size}x{patch_size}")


def _conv_stem(patch_size: int, in_channels: int, embed_dim: int) -> nn.Sequential:
    """Two 3x3 convolutions and a halving, until a patch is one pixel; widths double up to D, which a last one makes."""
    halvings = int(math.log2(patch_size))
    layers: list[nn.Module] = []
    width_in = in_channels
    for halving in range(halvings):
        width = max(embed_dim >> (halvings - halving), 16)
        layers += [ConvNorm(width_in, width), ConvNorm(width, width), nn.MaxPool2d(2)]
        width_in = width
    return nn.Sequential(*layers, ConvNorm(width_in, embed_dim))


class ConvNorm(nn.Sequential):
    """3x3 convolution, BatchNorm, ReLU; in evaluation the norm is folded into the convolution.

    There it is a fixed scale and shift of each channel, which on their own would cost a pass over all pictures.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        if self.training:
            return super().forward(input)
        convolution, norm, _ = self
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = convolution.weight * scale[:, None, None, None]
        return F.conv2d(input, weight, norm.bias - norm.running_mean * scale, padding=1).relu_()


class Attention(nn.Module):
    """Multi-head attention, of a sequence on itself or (`attend`) on another one; pre-norm is the caller's.

    Args:
        embed_dim: D.
        num_heads: H, divides D.
        dropout: probability on the output projection.
        kernel: explicit (matrix products and a softmax), fused (torch's scaled_dot_product_attention), or auto:
            explicit on a CPU, where with oneDNN's products it takes a tenth to a half of the time, unless there is
            one query only, as in writing a caption token by token; fused elsewhere.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, kernel: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel = kernel
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key_value = nn.Linear(embed_dim, 2 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.dropout = dropout_layer(dropout)

    def forward(
        self, sequence: TokenSequence, past: KeyValues | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention.

        Args:
            sequence: (B, N, D) tokens; its own `past`, of all layers, is not looked at.
            past: keys and values of the tokens before these: seen too, and extended by those of these tokens.
            need_weights: also return the attention map.

        Returns:
            (B, N, D), and the weights (B, H, N, S) or None; S is N and the length of the past.
        """
        tokens = sequence.tokens
        keys, values = self.keys_values(tokens)
        if past is not None:
            keys, values = past.append(keys, values)
        allowed = _allowed(tokens.shape[1], keys.shape[2], sequence.mask, sequence.causal, tokens.device)
        return self.attend(tokens, keys, values, allowed, need_weights)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> what a query compares itself with and what it gets, (B, H, S, D / H) each."""
        keys, values = self.key_value(context).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Of queries (B, N, D) on what `keys_values` returned of a context; as `forward` returns it.

        `allowed` is bool, broadcastable to (B, H, N, S); None is all.
        """
        q_BHNd = self._heads(self.query(query))
        explicit_is_faster = query.device.type == "cpu" and query.shape[1] > 1
        if need_weights or self.kernel == "explicit" or (self.kernel == "auto" and explicit_is_faster):
            x_BHNd, weights = _explicit_attention(q_BHNd, keys, values, allowed)
        else:
            x_BHNd, weights = F.scaled_dot_product_attention(q_BHNd, keys, values, attn_mask=allowed), None
        x = self.out(x_BHNd.transpose(1, 2).flatten(2))
        return self.dropout(x), weights if need_weights else None

    def _heads(self, x_BND: Tensor) -> Tensor:
        batch, length, width = x_BND.shape
        return x_BND.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


def _allowed(
    num_query: int, num_context: int, mask: Tensor | None, causal: bool, device: torch.device
) -> Tensor | None:
    """Which query may see which context token, broadcastable to (B, H, N, S); None is all.

    A causal query is the end of its context: its last token sees all of it.
    """
    allowed = mask[:, None, None, :].bool() if mask is not None else None
    if causal and num_query > 1:
        past_NS = torch.ones(num_query, num_context, dtype=torch.bool, device=device).tril(num_context - num_query)
        allowed = past_NS if allowed is None else allowed & past_NS
    return allowed


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    scores_BHNS = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if allowed is not None:
        scores_BHNS = scores_BHNS.masked_fill(~allowed, float("-inf"))
    weights_BHNS = scores_BHNS.softmax(-1)
    return weights_BHNS @ v, weights_BHNS


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode, then each of its modules back in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
