"""Who goes where: a router turns tokens into a `Routing`, whose plan says which experts each token is sent to.

A router is chosen by its name in `ROUTERS`; another one is one more class there. Shapes: T tokens, D width, E experts,
K experts chosen for a token; `...` any leading token axes.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import UserError, nearest
from diffmoe.model.layers import full_precision, widened


class Plan(NamedTuple):
    """What a dispatcher needs to know: of T tokens, each one's experts, and how much each of them counts."""

    expert_ids: Tensor
    """(T, K) int64; E is no expert."""
    gates: Tensor
    """(T, K) float; 0 where there is no expert."""
    tokens_per_expert: Tensor
    """(E,) int64, how often each expert is in `expert_ids`."""


@dataclass(frozen=True)
class Routing:
    """What one router decided, for whoever draws, measures or penalises it. `...` are the token axes of its input."""

    logits: Tensor
    """(..., E) float32 scores, with noise where there was any."""
    probs: Tensor
    """(..., E) float32, softmax of the logits."""
    gates: Tensor
    """(..., K) float32 weights of the chosen experts; 0 at padding."""
    expert_ids: Tensor
    """(..., K) int64, best first; E (no expert) at padding."""
    tokens_per_expert: Tensor
    """(E,) int64, routed slots that each expert received; padding is not counted."""
    mask: Tensor | None = None
    """(...) bool, True at real tokens; None when all are real."""
    place: str = ""
    """Where the block sits: image, text or fusion."""
    layer: int = 0
    """Its number there, from 0."""

    @property
    def plan(self) -> Plan:
        """Of all tokens, one after the other."""
        return Plan(self.expert_ids.flatten(0, -2), self.gates.flatten(0, -2), self.tokens_per_expert)


class Router(nn.Module, ABC):
    """Of any kind. A subclass has `forward` and says what a prediction may rest on.

    Args:
        embed_dim: D.
        num_experts: E.
        top_k: K <= E.
        noise: learned noise on the logits in training, where the router has any.
    """

    dropless: ClassVar[bool]
    """No token is ever turned away for another one's sake: what is predicted does not depend on the batch."""
    causal: ClassVar[bool]
    """A token's experts depend on no token after it: a caption that is being written may be routed so."""

    balance_bias: Tensor

    def __init__(self, embed_dim: int, num_experts: int, top_k: int, noise: bool = False) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}: it must be from 1 to the number of experts ({num_experts})")
        self.top_k = top_k
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
        probs = logits.softmax(-1)
        expert_ids = (probs + self.balance_bias).topk(self.top_k, dim=-1).indices
        gates = logits.gather(-1, expert_ids).softmax(-1) if self.top_k > 1 else probs.gather(-1, expert_ids)
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


class AttentiveRouter(Router):
    """Noisy token-choice top-k router: each token's query against E learned expert keys, scaled dot product.

    Keys are initialised orthogonally (no two experts start alike). Computed in float32, under autocast too.

    Args:
        embed_dim: D.
        num_experts: E.
        top_k: K <= E.
        noise: learned noise on the logits in training (Shazeer et al. 2017, eq. 4).
    """

    dropless = True
    causal = True

    def __init__(self, embed_dim: int, num_experts: int, top_k: int, noise: bool = False) -> None:
        super().__init__(embed_dim, num_experts, top_k, noise)
        router_dim = max(min(embed_dim, 64), num_experts)  # wide enough for E orthogonal keys
        self.query = nn.Linear(embed_dim, router_dim, bias=False)
        self.keys = nn.Parameter(torch.empty(num_experts, router_dim))
        self.noise = nn.Linear(embed_dim, num_experts, bias=False) if noise else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthonormal keys, and queries scaled so that the logits of a normalised token start with unit variance."""
        nn.init.orthogonal_(self.keys)
        router_dim, embed_dim = self.query.weight.shape
        nn.init.normal_(self.query.weight, std=(router_dim / embed_dim) ** 0.5)
        if self.noise is not None:
            nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with full_precision(x):
            x = widened(x)
            # (x Wq) keys' = x (keys Wq)': the queries themselves are never needed, and E rows are fewer than theirs.
            scorer = self.keys.to(x) @ self.query.weight.to(x) * self.keys.shape[1] ** -0.5
            logits = F.linear(x, scorer)
            if self.noise is not None and self.training:
                spread = F.softplus(F.linear(x, self.noise.weight.to(x)))
                logits = logits + torch.randn_like(logits) * spread
            return self.choose(logits, mask)


ROUTERS: dict[str, type[Router]] = {"attentive": AttentiveRouter}
"""By the name that `ModelConfig.router` gives."""


def router_kind(name: str) -> type[Router]:
    """The router of that name. Raises `UserError` where there is none."""
    if name not in ROUTERS:
        raise UserError(f"router is {name!r}: it must be one of {', '.join(ROUTERS)}{nearest(name, ROUTERS)}")
    return ROUTERS[name]


def count_tokens(expert_ids: Tensor, num_experts: int) -> Tensor:
    """(..., K) int64 -> (E,) int64, how often each of the experts is there; E, no expert, is not counted.

    On the device and of a known shape: nothing waits, and a compiler goes on.
    """
    ids_S = expert_ids.flatten()
    return ids_S.new_zeros(num_experts + 1).scatter_add_(0, ids_S, torch.ones_like(ids_S))[:num_experts]


def at(routing: Routing, place: str, layer: int) -> Routing:
    """The same, with where its block sits."""
    return dataclasses.replace(routing, place=place, layer=layer)
