"""The routed pool of general experts: who goes where (the router), and the experts; `dispatch` gets them there.

Shapes: T tokens, D width, E experts, K experts chosen for a token, F hidden width of an expert; `...` any leading
token axes.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import UserError
from diffmoe.model.dispatch import BACKENDS, choose_backend, why_not
from diffmoe.model.sorted_rows import ExpertWeights


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
    mask: Tensor | None = None
    """(...) bool, True at real tokens; None when all are real."""
    place: str = ""
    """Where the block sits: image, text or fusion."""
    layer: int = 0
    """Its number there, from 0."""

    @cached_property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int64, routed slots that each expert received; padding is not counted."""
        num_experts = self.probs.shape[-1]
        return torch.bincount(self.expert_ids.flatten(), minlength=num_experts + 1)[:num_experts]


class AttentiveRouter(nn.Module):
    """Noisy token-choice top-k router: each token's query against E learned expert keys, scaled dot product.

    Keys are initialised orthogonally (no two experts start alike). Computed in float32, under autocast too.
    Gates are the chosen probabilities over their sum; for K = 1 the probability itself, or the router would get no
    gradient.

    Args:
        embed_dim: D.
        num_experts: E.
        top_k: K <= E.
        noise: learned noise on the logits in training (Shazeer et al. 2017, eq. 4).
    """

    balance_bias: Tensor

    def __init__(self, embed_dim: int, num_experts: int, top_k: int, noise: bool = False) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}: it must be from 1 to the number of experts ({num_experts})")
        self.top_k = top_k
        router_dim = max(min(embed_dim, 64), num_experts)  # wide enough for E orthogonal keys
        self.query = nn.Linear(embed_dim, router_dim, bias=False)
        self.keys = nn.Parameter(torch.empty(num_experts, router_dim))
        self.noise = nn.Linear(embed_dim, num_experts, bias=False) if noise else None
        # Added to the scores for the choice only, never to the gates; moved by `update_balance_bias`.
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthonormal keys, and queries scaled so that the logits of a normalised token start with unit variance."""
        nn.init.orthogonal_(self.keys)
        router_dim, embed_dim = self.query.weight.shape
        nn.init.normal_(self.query.weight, std=(router_dim / embed_dim) ** 0.5)
        if self.noise is not None:
            nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route.

        Args:
            x: (..., D) normalised tokens.
            mask: (...), True or 1 at real tokens; padding is sent to no expert.
        """
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            # (x Wq) keys' = x (keys Wq)': the queries themselves are never needed, and E rows are fewer than theirs.
            scorer = self.keys.to(x) @ self.query.weight.to(x) * self.keys.shape[1] ** -0.5
            logits = F.linear(x, scorer)
            if self.noise is not None and self.training:
                spread = F.softplus(F.linear(x, self.noise.weight.to(x)))
                logits = logits + torch.randn_like(logits) * spread
            probs = logits.softmax(-1)
        return self.choose(logits, probs, mask)

    def choose(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> Routing:
        """Top-k of the probabilities, and their gates."""
        expert_ids = (probs + self.balance_bias).topk(self.top_k, dim=-1).indices
        gates = probs.gather(-1, expert_ids)
        if self.top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        if mask is not None:
            mask = mask.bool()
            expert_ids = expert_ids.masked_fill(~mask[..., None], probs.shape[-1])
            gates = gates * mask[..., None]
        return Routing(logits, probs, gates, expert_ids, mask)

    @torch.no_grad()
    def update_balance_bias(self, tokens_per_expert: Tensor, rate: float) -> None:
        """Balancing without a loss (DeepSeek-V3, section 2.1.2): raise the under-loaded's bias, lower the rest."""
        load = tokens_per_expert.to(self.balance_bias)
        self.balance_bias += rate * (load.mean() - load).sign()


class GeneralExperts(nn.Module):
    """The routed pool alone: `y, routing = pool(x)` with y = sum over a token's chosen experts of gate * expert(x).

    Dropless: no token is ever turned away, so that a prediction does not depend on its batch-mates. Padding (by
    `mask`) is sent nowhere and comes out as zeros. The residual connection is the caller's.

    Args:
        embed_dim: D.
        num_experts: E.
        top_k: K, experts for each token.
        expansion_factor: hidden width over D.
        activation: gelu, relu or silu.
        dropout: probability, after the activation and at the end.
        layer_norm_eps: epsilon of the experts' LayerNorms.
        router_noise: learned noise on the router's scores in training.
        backend: how tokens get to their experts, a name of `dispatch.BACKENDS`; "auto" is the fastest here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        top_k: int,
        expansion_factor: float = 4,
        activation: str = "gelu",
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        router_noise: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}: it must be auto or one of {', '.join(BACKENDS)}")
        hidden = round(expansion_factor * embed_dim)
        self.backend = backend
        self.embed_dim, self.activation, self.dropout, self.eps = embed_dim, activation, dropout, layer_norm_eps
        self.router = AttentiveRouter(embed_dim, num_experts, top_k, noise=router_noise)
        self.gain = nn.Parameter(torch.ones(num_experts, embed_dim))
        self.shift = nn.Parameter(torch.zeros(num_experts, embed_dim))
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, embed_dim))
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, embed_dim, hidden))
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, embed_dim))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Experts' weights normal with this standard deviation; their biases and norms are set when made."""
        nn.init.normal_(self.fc1_weight, std=std)
        nn.init.normal_(self.fc2_weight, std=std)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(..., D), and mask (...) with True or 1 at real tokens -> (..., D), and the `Routing`.

        Raises `ValueError` where the shapes do not fit or `x` is not floating, and what `dispatch` raises.
        """
        if x.shape[-1] != self.embed_dim or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}: it must be floating and (..., {self.embed_dim})"
            )
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask is of shape {tuple(mask.shape)}: it must be {tuple(x.shape[:-1])}, as x without D")
        # The experts' LayerNorms differ in gain and bias only: normalise once, before the tokens are copied K times.
        x_normed = F.layer_norm(x, (self.embed_dim,), eps=self.eps)
        routing = self.router(x_normed, mask)
        top_k = self.router.top_k
        y_TD = self.dispatch(
            x_normed.reshape(-1, self.embed_dim),
            routing.expert_ids.reshape(-1, top_k),
            routing.gates.reshape(-1, top_k),
        )
        return y_TD.view(x.shape), routing

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Send tokens to the experts chosen for them, and weight what comes back: (T, D), (T, K), (T, K) -> (T, D).

        In the dtype of autocast where that is on, else in that of `x_TD`. An expert id of E is no expert, gate 0.
        Raises `ValueError` where shapes do not fit, `UserError` where the backend cannot run here, `FloatingPointError`
        where a gate is not finite (checked on the CPU only: on a GPU it would wait for the device).
        """
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        x_TD, gates_TK = x_TD.to(dtype), gates_TK.to(dtype)
        stacks = (self.gain, self.shift, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        weights = ExpertWeights(*(stacks if self.gain.dtype == dtype else (stack.to(dtype) for stack in stacks)))
        if not torch.compiler.is_compiling():
            _check_gates(expert_ids_TK, gates_TK, len(x_TD))
        name = choose_backend(x_TD, expert_ids_TK.numel(), weights) if self.backend == "auto" else self.backend
        if reason := why_not(name, x_TD, weights):
            able = [other for other in BACKENDS if why_not(other, x_TD, weights) is None]
            raise UserError(f"expert_backend {name!r} cannot run here: {reason}; {', '.join(able)} and auto can")
        dropout = self.dropout if self.training else 0.0
        return BACKENDS[name](x_TD, expert_ids_TK, gates_TK, weights, self.activation, dropout)


def _check_gates(expert_ids_TK: Tensor, gates_TK: Tensor, num_tokens: int) -> None:
    if expert_ids_TK.shape != gates_TK.shape or len(gates_TK) != num_tokens:
        raise ValueError(
            f"expert_ids of shape {tuple(expert_ids_TK.shape)} and gates of shape {tuple(gates_TK.shape)} "
            f"do not fit {num_tokens} tokens: both must be (tokens, K)"
        )
    if gates_TK.device.type == "cpu" and not math.isfinite(gates_TK.detach().sum(dtype=torch.float32).item()):
        raise FloatingPointError("the router's gates are not finite: training diverged, or the input has nan or inf")
