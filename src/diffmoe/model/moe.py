"""The routed pool of general experts: who goes where (router), getting there and back (dispatch), the experts.

Shapes: T tokens, D width, R router width, E experts, K experts chosen for a token, F hidden width of an expert,
P rows of the sorted buffer (T * K slots, and padding between experts); `...` any leading token axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.model.layers import ACTIVATIONS


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
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            query = F.linear(x, self.query.weight.to(x))
            logits = query @ self.keys.to(x).T * self.keys.shape[1] ** -0.5
            if self.noise is not None and self.training:
                spread = F.softplus(F.linear(x, self.noise.weight.to(x)))
                logits = logits + torch.randn_like(logits) * spread
            probs = logits.softmax(-1)
        return self.choose(logits, probs, mask)

    def choose(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> Routing:
        """Top-k of the probabilities, their gates and the load."""
        num_experts = probs.shape[-1]
        expert_ids = (probs + self.balance_bias).topk(self.top_k, dim=-1).indices
        gates = probs.gather(-1, expert_ids)
        if self.top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        if mask is not None:
            mask = mask.bool()
            expert_ids = expert_ids.masked_fill(~mask[..., None], num_experts)
            gates = gates * mask[..., None]
        tokens_per_expert = torch.bincount(expert_ids.flatten(), minlength=num_experts + 1)[:num_experts]
        return Routing(logits, probs, gates, expert_ids, tokens_per_expert, mask)

    @torch.no_grad()
    def update_balance_bias(self, tokens_per_expert: Tensor, rate: float) -> None:
        """Balancing without a loss (DeepSeek-V3, section 2.1.2): raise the under-loaded's bias, lower the rest."""
        load = tokens_per_expert.to(self.balance_bias)
        self.balance_bias += rate * (load.mean() - load).sign()


class ExpertWeights(NamedTuple):
    """The stacked parameters of E experts: LayerNorm gain and bias (E, D), then the two Linear layers."""

    gain: Tensor
    shift: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


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
    ) -> None:
        super().__init__()
        hidden = round(expansion_factor * embed_dim)
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
        """(..., D), and mask (...) with True or 1 at real tokens -> (..., D), and the `Routing`."""
        # The experts' LayerNorms differ in gain and bias only: normalise once, before the tokens are copied K times.
        x_normed = F.layer_norm(x, (self.embed_dim,), eps=self.eps)
        routing = self.router(x_normed, mask)
        top_k = self.router.top_k
        y_TD = self.dispatch(
            x_normed.reshape(-1, self.embed_dim),
            routing.expert_ids.reshape(-1, top_k),
            routing.gates.reshape(-1, top_k).to(x_normed.dtype),
        )
        return y_TD.view(x.shape), routing

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Send tokens to their experts and sum what comes back: (T, D), (T, K), (T, K) -> (T, D)."""
        weights = ExpertWeights(self.gain, self.shift, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        dropout = self.dropout if self.training else 0.0
        backend = padded_experts if expert_ids_TK.numel() <= FEW_SLOTS else sorted_experts
        return backend(x_TD, expert_ids_TK, gates_TK, weights, self.activation, dropout)


FEW_SLOTS = 256
"""Up to this many slots (tokens * K), one batched product over padded experts beats a product for each expert."""
MIN_ROWS = 16
"""An expert's rows are padded to a multiple of this: products of fewer rows take other kernels, which round otherwise,
and then a token's output would depend, in its last bits, on how many others its expert was given."""


def sorted_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """Sort the slots by expert, run each expert on its own contiguous rows, gather back, weight, sum over K.

    Each expert's rows are rounded up to a multiple of a power of two: oneDNN builds a kernel for every new shape, and
    routing that changes at every step would otherwise bring new shapes at every step.
    """
    num_experts = weights.gain.shape[0]
    source_P, slot_TK, rows = _sort_slots(expert_ids_TK, num_experts)
    outputs = []
    x_sorted = _Gather.apply(x_TD, source_P, slot_TK).split(rows)
    for x_rD, *expert in zip(x_sorted[:-1], *(w.unbind(0) for w in weights), strict=True):
        if len(x_rD):
            outputs.append(_expert(x_rD, ExpertWeights(*expert), activation, dropout))
    num_nowhere = rows[-1]
    outputs.append(x_TD.new_zeros(num_nowhere, x_TD.shape[1], dtype=outputs[0].dtype if outputs else x_TD.dtype))
    y_TKD = _GatherBack.apply(torch.cat(outputs), slot_TK)
    return (gates_TK[:, None].to(y_TKD.dtype) @ y_TKD).squeeze(1)


def _expert(x: Tensor, expert: ExpertWeights, activation: str, dropout: float) -> Tensor:
    """One expert on its rows, the LayerNorm's gain and bias included: (rows, D) -> (rows, D)."""
    hidden = F.linear(torch.addcmul(expert.shift, x, expert.gain), expert.fc1_weight, expert.fc1_bias)
    hidden = ACTIVATIONS[activation](hidden)
    if dropout > 0:
        hidden = F.dropout(hidden, dropout)
    out = F.linear(hidden, expert.fc2_weight, expert.fc2_bias)
    return F.dropout(out, dropout) if dropout > 0 else out


def _sort_slots(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Where each row of the sorted buffer comes from, where each slot went, and each expert's rows.

    Returns:
        (P,) the token of each row (padding rows hold token 0 and are never gathered back); (T, K) the row of each
        slot; E + 1 row counts, the last one for the slots that go nowhere (expert id E).
    """
    num_slots = expert_ids_TK.numel()
    ids_S = expert_ids_TK.flatten()
    order_S = ids_S.argsort(stable=True)
    count_E = torch.bincount(ids_S, minlength=num_experts + 1)
    multiple = _row_multiple(num_slots, num_experts)
    row_count_E = (count_E + multiple - 1) // multiple * multiple
    # A slot moves down by the padding of all experts before its own.
    padding_before_E = (row_count_E - count_E).cumsum(0) - (row_count_E - count_E)
    row_S = torch.arange(num_slots, device=ids_S.device) + padding_before_E[ids_S[order_S]]
    rows = row_count_E.tolist()  # the one synchronisation with the device
    source_P = ids_S.new_zeros(sum(rows)).index_copy_(0, row_S, order_S // expert_ids_TK.shape[1])
    slot_S = torch.empty_like(row_S).index_copy_(0, order_S, row_S)
    return source_P, slot_S.view_as(expert_ids_TK), rows


def _row_multiple(num_slots: int, num_experts: int) -> int:
    """A power of two from MIN_ROWS to 256 that pads an average expert's rows by about a sixteenth."""
    eighth = num_slots // (8 * num_experts)  # of an average expert's rows; rounding up adds half of it on average
    return min(256, max(MIN_ROWS, (1 << eighth.bit_length()) >> 1))


class _Gather(torch.autograd.Function):
    """x_TD[source_P]. Each token is taken K times, at known rows, so its gradient is a gather and a sum over K:
    many times faster on a CPU than the scattered additions that indexing would do.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_P: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return x_TD.index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return _take(grads[0], slot_TK).sum(1), None, None


class _GatherBack(torch.autograd.Function):
    """y_PD[slot_TK]. No row is taken twice, so its gradient is a plain copy; rows never taken get zero."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        ctx.num_rows = len(y_PD)
        return _take(y_PD, slot_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slot_TK,) = ctx.saved_tensors
        grad_SD = grads[0].flatten(0, 1)
        return grad_SD.new_zeros(ctx.num_rows, grad_SD.shape[1]).index_copy_(0, slot_TK.flatten(), grad_SD), None


def _take(rows_PD: Tensor, index_TK: Tensor) -> Tensor:
    return rows_PD.index_select(0, index_TK.flatten()).unflatten(0, index_TK.shape)


def padded_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """Pad every expert to the fullest one and run them all in one batched product: best for a handful of tokens."""
    num_experts = weights.gain.shape[0]
    ids_S = expert_ids_TK.flatten()
    in_expert_SE = F.one_hot(ids_S, num_experts + 1)[:, :num_experts]
    rank_S = (in_expert_SE.cumsum(0) * in_expert_SE).sum(-1) - 1  # a slot's place in its expert's queue; -1 nowhere
    fullest = int(in_expert_SE.sum(0).max())
    capacity = -(-fullest // MIN_ROWS) * MIN_ROWS
    real_S = rank_S >= 0
    cell_S = (ids_S * capacity + rank_S).masked_fill(~real_S, num_experts * capacity)  # nowhere: one cell past the end
    x_SD = x_TD.repeat_interleave(expert_ids_TK.shape[1], 0)
    x_ECD = x_TD.new_zeros(num_experts * capacity + 1, x_TD.shape[1]).index_copy(0, cell_S, x_SD)
    x_ECD = x_ECD[:-1].unflatten(0, (num_experts, capacity))
    hidden_ECF = torch.addcmul(weights.shift[:, None], x_ECD, weights.gain[:, None])
    hidden_ECF = torch.baddbmm(weights.fc1_bias[:, None], hidden_ECF, weights.fc1_weight.mT)
    hidden_ECF = ACTIVATIONS[activation](hidden_ECF)
    if dropout > 0:
        hidden_ECF = F.dropout(hidden_ECF, dropout)
    y_ECD = torch.baddbmm(weights.fc2_bias[:, None], hidden_ECF, weights.fc2_weight.mT)
    if dropout > 0:
        y_ECD = F.dropout(y_ECD, dropout)
    y_cells = F.pad(y_ECD.flatten(0, 1), (0, 0, 0, 1))
    y_TKD = y_cells.index_select(0, cell_S).unflatten(0, expert_ids_TK.shape)
    return (gates_TK[:, None].to(y_TKD.dtype) @ y_TKD).squeeze(1)
