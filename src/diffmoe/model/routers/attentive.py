"""Routers by attention: a query against learned expert keys; each token's own, a picture's, or the experts' choice.

Shapes: N tokens of a sequence, D width, E experts, K experts chosen for a token; `...` any leading token axes.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.model.layers import full_precision, widened
from diffmoe.model.routers.base import Router, RouterOptions, mean_token
from diffmoe.model.routing import Routing, count_tokens


class AttentiveRouter(Router):
    """Noisy token-choice top-k router: each token's query against E learned expert keys, scaled dot product.

    Keys are initialised orthogonally (no two experts start alike). Computed in float32, under autocast too. The noise
    is that of Shazeer et al. 2017, eq. 4. Args: as `Router`.
    """

    causal = True
    guidable = True

    def __init__(self, embed_dim: int, num_experts: int, top_k: int, **options: Unpack[RouterOptions]) -> None:
        super().__init__(embed_dim, num_experts, top_k, **options)
        router_dim = max(min(embed_dim, 64), num_experts)  # wide enough for E orthogonal keys
        self.query = nn.Linear(embed_dim, router_dim, bias=False)
        self.keys = nn.Parameter(torch.empty(num_experts, router_dim))
        self.noise = nn.Linear(embed_dim, num_experts, bias=False) if options.get("noise") else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthonormal keys, and queries scaled so that the logits of a normalised token start with unit variance."""
        nn.init.orthogonal_(self.keys)
        router_dim, embed_dim = self.query.weight.shape
        nn.init.normal_(self.query.weight, std=(router_dim / embed_dim) ** 0.5)
        if self.noise is not None:
            nn.init.zeros_(self.noise.weight)

    @torch.no_grad()
    def start_at(self, centroids: Tensor) -> None:
        """Start anew, from clusters of tokens: the nearer a token is to an expert's centroid, the larger its logit.

        A token x has the logits x · c_e / |c_e|, less their mean over the experts, which changes no choice. The nearest
        centroid, by angle, has the largest. They are scaled so that those of the centroids themselves have unit
        variance, as a fresh router's. Cluster-aware upcycling (arXiv 2604.13508) starts routers so.

        Args:
            centroids: (E, D), means of tokens such as `forward` gets.
        """
        self.reset_parameters()
        directions = F.normalize(centroids, dim=-1)
        directions = directions - directions.mean(0)
        directions = directions / (centroids @ directions.T).std().clamp_min(1e-6)
        # The keys stay orthonormal; of the queries only what meets them is set.
        keys, query = self.keys, self.query.weight
        query += keys.T @ (directions.to(query) * keys.shape[1] ** 0.5 - keys @ query)

    def score(self, x: Tensor) -> Tensor:
        """(..., D) float32 -> logits (..., E), with noise in training where there is any."""
        # (x Wq) keys' = x (keys Wq)': the queries themselves are never needed, and E rows are fewer than theirs.
        scorer = self.keys.to(x) @ self.query.weight.to(x) * self.keys.shape[1] ** -0.5
        logits = F.linear(x, scorer)
        if self.noise is None or not self.training:
            return logits
        return logits + torch.randn_like(logits) * F.softplus(F.linear(x, self.noise.weight.to(x)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with full_precision(x):
            return self.choose(self.score(widened(x)), mask)


class PictureRouter(AttentiveRouter):
    """One choice a sequence: the mean of its tokens is routed, and all of them go where it goes.

    What small vision models gained from (Daxberger et al. 2023, "Mobile V-MoEs", arXiv 2309.04354). Args: as `Router`.
    """

    causal = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with full_precision(x):
            x = widened(x)
            logits = self.score(mean_token(x, mask)).expand(*x.shape[:-1], -1)
            return self.choose(logits, mask)


class ExpertChoiceRouter(AttentiveRouter):
    """Expert choice: of each sequence every expert takes its N * K / E most probable tokens (Zhou et al. 2022).

    Perfectly balanced; a token may get no expert, or all E. Within one sequence, so that a prediction does not depend
    on its batch. K of the `Routing` is E here: E, no expert, where one did not take the token. A gate is the
    probability times gate_scale. Args: as `Router`.
    """

    causal = False
    guidable = False  # every expert takes its share of every picture

    def choose(self, logits: Tensor, mask: Tensor | None) -> Routing:
        num_experts, length = logits.shape[-1], logits.shape[-2]
        probs = logits.softmax(-1)
        wanted = probs.detach() + self.balance_bias
        capacity = min(length, -(-length * self.top_k // num_experts))
        if mask is not None:
            mask = mask.bool()
            wanted = wanted.masked_fill(~mask[..., None], -1.0)
        taken = torch.zeros_like(wanted, dtype=torch.bool)
        taken.scatter_(-2, wanted.topk(capacity, dim=-2).indices, True)
        if mask is not None:
            taken = taken & mask[..., None]
        gates = (logits.sigmoid() if self.is_sigmoid else probs) * taken * self.gate_scale
        gates, expert_ids = gates.sort(dim=-1, descending=True, stable=True)
        expert_ids = torch.where(taken.gather(-1, expert_ids), expert_ids, num_experts)
        return Routing(logits, probs, gates, expert_ids, count_tokens(expert_ids, num_experts), mask)
