"""What a router is.

Shapes: N tokens of a sequence, D width, E experts, K experts chosen for a token; `...` any leading token axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.model.routing import Routing, count_tokens


class RouterOptions(TypedDict, total=False):
    """What a router may be told besides its sizes; as the arguments of `Router`, which has the defaults."""

    noise: bool
    gate: str
    gate_scale: float


class Router(nn.Module, ABC):
    """Of any kind. A subclass has `forward` and says what a prediction may rest on.

    Args:
        embed_dim: D.
        num_experts: E.
        top_k: K <= E.
        noise: learned noise on the logits in training, where the router has any.
        gate: softmax, whose probabilities compete, or sigmoid, which scores each expert by itself (DeepSeek-V3).
        gate_scale: what the gates of a token add up to: 1, the weighted mean of its experts; K, about their sum.
    """

    dropless: ClassVar[bool] = True
    """No token is ever turned away for another sequence's sake: what is predicted does not depend on the batch."""
    causal: ClassVar[bool]
    """A token's experts depend on no token after it: a caption that is being written may be routed so."""

    guidable: ClassVar[bool] = False
    """It can learn to send all of a picture to one expert: `router_guidance_weight` has an effect."""

    balance_bias: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        top_k: int,
        noise: bool = False,
        gate: str = "softmax",
        gate_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}: it must be from 1 to the number of experts ({num_experts})")
        self.top_k, self.gate_scale, self.is_sigmoid = top_k, gate_scale, gate == "sigmoid"
        # Added to the probabilities for the choice only, never to the gates; moved by the training loop, between steps.
        self.register_buffer("balance_bias", torch.zeros(num_experts))

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route.

        Args:
            x: (..., D) normalised tokens.
            mask: (...), True or 1 at real tokens; padding is sent to no expert.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Start anew; a model's own initialisation leaves routers alone."""

    def choose(self, logits: Tensor, mask: Tensor | None) -> Routing:
        """Token choice: each token's K most probable experts.

        Gates are their probabilities over their sum: the softmax of their logits, which holds where the probabilities
        themselves have underflowed. For K = 1 the probability itself, or the router would get no gradient.
        """
        num_experts = logits.shape[-1]
        scores = F.logsigmoid(logits) if self.is_sigmoid else logits
        probs = scores.softmax(-1)
        expert_ids = (probs + self.balance_bias).topk(self.top_k, dim=-1).indices
        if self.top_k > 1:
            gates = scores.gather(-1, expert_ids).softmax(-1)
        else:
            gates = (logits.sigmoid() if self.is_sigmoid else probs).gather(-1, expert_ids)
        if self.gate_scale != 1:
            gates = gates * self.gate_scale
        if mask is not None:
            mask = mask.bool()
            expert_ids = expert_ids.masked_fill(~mask[..., None], num_experts)
            gates = gates * mask[..., None]
        return Routing(logits, probs, gates, expert_ids, count_tokens(expert_ids, num_experts), mask)

    @torch.no_grad()
    def update_balance_bias(self, tokens_per_expert: Tensor, rate: float) -> None:
        """Balancing without a loss (DeepSeek-V3, section 2.1.2): raise the under-loaded's bias, lower the rest."""
        load = tokens_per_expert.to(self.balance_bias)
        self.balance_bias += rate * (load.mean() - load).sign()


def mean_token(x: Tensor, mask: Tensor | None) -> Tensor:
    """(..., N, D) and mask (..., N) -> (..., 1, D), the mean of the real tokens; 0 where there is none."""
    if mask is None:
        return x.mean(-2, keepdim=True)
    weight = mask.to(x)[..., None]
    return (x * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1)
