"""The parts that a block is made of: expert FFN and attention.

Shapes: B batch, N query tokens, S context tokens, D width, H heads.
"""

from __future__ import annotations

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
