"""The experts' arithmetic: rows and how many each expert has in, rows out. Nothing here knows of tokens or gates.

An expert is gain, shift, Linear, activation, Linear, with stacked weights; the rows are normalised.
Shapes: D width, E experts, F hidden width of an expert, P rows, expert after expert, C rows of each expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.model.layers import ACTIVATIONS

MIN_ROWS = 16
"""An expert's rows are padded to a multiple of this: products of fewer rows take other kernels, which round otherwise,
and then a token's output would depend, in its last bits, on how many others its expert was given."""

Rows = list[int] | Tensor | None
"""How many rows each expert has: E numbers here, or (E,) int64 on the device; None: all as many."""


class ExpertWeights(NamedTuple):
    """The stacked parameters of E experts: LayerNorm gain and shift (E, D), then the two Linear layers.

    Or those of one expert, without the first axis.
    """

    gain: Tensor
    shift: Tensor
    fc1_weight: Tensor
    """(E, F, D)."""
    fc1_bias: Tensor
    fc2_weight: Tensor
    """(E, D, F)."""
    fc2_bias: Tensor


RunExperts = Callable[[Tensor, Any, ExpertWeights, str, float], Tensor]
"""x_PD, rows, weights, activation, dropout -> y_PD, which is 0 in rows that are nobody's, after all experts' own."""


def looped_experts(x_PD: Tensor, rows: list[int], weights: ExpertWeights, activation: str, dropout: float) -> Tensor:
    """Each expert on its own rows, one after the other: CPUs."""
    scale_PF = F.dropout(x_PD.new_ones(len(x_PD), weights.fc1_bias.shape[1]), dropout) if dropout > 0 else None
    y_PD = _RunExperts.apply(x_PD, rows, activation, scale_PF, *weights)
    return F.dropout(y_PD, dropout) if dropout > 0 else y_PD


def batched_experts(
    x_PD: Tensor, rows: list[int] | None, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """All experts in one batched product where they have as many rows each, else by themselves; a handful of rows."""
    num_experts, width = weights.gain.shape
    if rows is None or len(set(rows)) == 1:
        count = len(x_PD) // num_experts if rows is None else rows[0]
        used = num_experts * count
        y_PD = all_experts(x_PD[:used].view(num_experts, count, width), weights, activation, dropout).flatten(0, 1)
    else:
        used = sum(rows)
        # Two halves of an expert's rows: a batched product again, which rounds as that of all experts does.
        halves = [(x.view(2, -1, width), expert) for expert, (x,) in _by_expert(rows, weights, x_PD)]
        y_PD = torch.cat([all_experts(*half, activation, dropout).flatten(0, 1) for half in halves])
    return F.pad(y_PD, (0, 0, 0, len(x_PD) - used)) if rows is not None and used < len(x_PD) else y_PD


def all_experts(x_ECD: Tensor, weights: ExpertWeights, activation: str, dropout: float) -> Tensor:
    """Each expert on its own C rows, in batched products: (E, C, D) -> (E, C, D); or one expert's weights on them all.

    Weights times rows, not rows times weights: for few rows a CPU takes two thirds of the time that way around.
    """
    gain, shift, fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    batch = len(x_ECD)
    x_ECD = torch.addcmul(shift.unsqueeze(-2), x_ECD, gain.unsqueeze(-2))
    hidden_EFC = torch.bmm(fc1_weight.expand(batch, -1, -1), x_ECD.mT).add_(fc1_bias.unsqueeze(-1))
    hidden_EFC = ACTIVATIONS[activation](hidden_EFC)
    if dropout > 0:
        hidden_EFC = F.dropout(hidden_EFC, dropout)
    y_EDC = torch.bmm(fc2_weight.expand(batch, -1, -1), hidden_EFC).add_(fc2_bias.unsqueeze(-1))
    return F.dropout(y_EDC, dropout).mT if dropout > 0 else y_EDC.mT


def grouped_experts(x_PD: Tensor, count_E: Tensor, weights: ExpertWeights, activation: str, dropout: float) -> Tensor:
    """Through torch's grouped_mm, no row being nobody's: GPUs in bfloat16. No count leaves the device."""
    end_E = count_E.cumsum(0)
    # A row's own gain, shift and biases, by a product with its one-hot expert: exact, and its gradient is a product
    # too, where indexing would add thousands of rows into the same few, one after the other.
    expert_P = torch.searchsorted(end_E, torch.arange(len(x_PD), device=x_PD.device), right=True)
    expert_PE = F.one_hot(expert_P, len(count_E)).to(x_PD.dtype)
    end_E = end_E.to(torch.int32)
    x_PD = torch.addcmul(expert_PE @ weights.shift, x_PD, expert_PE @ weights.gain)
    hidden_PF = F.grouped_mm(x_PD, weights.fc1_weight.mT, offs=end_E) + expert_PE @ weights.fc1_bias
    hidden_PF = ACTIVATIONS[activation](hidden_PF)
    if dropout > 0:
        hidden_PF = F.dropout(hidden_PF, dropout)
    y_PD = F.grouped_mm(hidden_PF, weights.fc2_weight.mT, offs=end_E) + expert_PE @ weights.fc2_bias
    return F.dropout(y_PD, dropout) if dropout > 0 else y_PD


def why_not_grouped(x_PD: Tensor, weights: ExpertWeights) -> str | None:
    """What keeps `grouped_experts` from running on these tensors here; None where nothing does."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if x_PD.dtype == torch.float64:
        return "grouped_mm takes no float64"
    if x_PD.is_cuda and x_PD.dtype != torch.bfloat16:
        return f"on a GPU grouped_mm takes bfloat16, not {x_PD.dtype} (precision bf16-mixed)"
    if x_PD.is_cuda and torch.cuda.get_device_capability(x_PD.device) < (8, 0):
        return "grouped_mm needs a GPU of compute capability 8.0 or more"
    for width in weights.fc1_weight.shape[1:]:
        if width * x_PD.element_size() % 16:
            return f"grouped_mm needs widths of a multiple of 16 bytes, which {width} of {x_PD.dtype} is not"
    return None


ACTIVATIONS_OUT: dict[str, Callable[..., Tensor]] = {
    "gelu": torch.ops.aten.gelu.out,
    "relu": lambda x, out: torch.clamp_min(x, 0, out=out),
    "silu": torch.ops.aten.silu.out,
}
"""The activations of `layers.ACTIVATIONS`, writing where they are told."""
ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "relu": lambda grad, x: torch.ops.aten.threshold_backward.default(grad, x, 0),
    "silu": torch.ops.aten.silu_backward.default,
}
"""Gradient at an activation's output and the activation's input -> gradient at its input."""


class _RunExperts(torch.autograd.Function):
    """Each expert on its rows, x_PD -> y_PD, every product written where it belongs.

    By hand, because autograd would slice, stack and concatenate all rows and all weights' gradients once more.
    `scale_PF` is the dropout on the hidden units, 0 or 1 / (1 - p); None is no dropout.
    """

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, rows: list[int], activation: str, scale_PF: Tensor | None, *weights: Tensor
    ) -> Tensor:
        hidden_PF = x_PD.new_empty(len(x_PD), weights[3].shape[1])
        active_PF = torch.empty_like(hidden_PF)
        y_PD = torch.empty_like(x_PD)
        for expert, (x, hidden, active, scale, y) in _by_expert(
            rows, weights, x_PD, hidden_PF, active_PF, scale_PF, y_PD
        ):
            torch.addmm(expert.fc1_bias, torch.addcmul(expert.shift, x, expert.gain), expert.fc1_weight.T, out=hidden)
            ACTIVATIONS_OUT[activation](hidden, out=active)
            if scale is not None:
                active.mul_(scale)
            torch.addmm(expert.fc2_bias, active, expert.fc2_weight.T, out=y)
        y_PD[sum(rows) :].zero_()
        ctx.save_for_backward(x_PD, hidden_PF, active_PF, scale_PF, *weights)
        ctx.rows, ctx.activation = rows, activation
        return y_PD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, hidden_PF, active_PF, scale_PF, *weights = ctx.saved_tensors
        grad_x_PD = torch.empty_like(x_PD)
        grad_x_PD[sum(ctx.rows) :].zero_()
        grad_weights = [torch.empty_like(weight) for weight in weights]
        for number, count in enumerate(ctx.rows):
            if not count:
                for grad in grad_weights:
                    grad[number].zero_()
        buffers = (x_PD, hidden_PF, active_PF, scale_PF, grads[0], grad_x_PD)
        for (expert, (x, hidden, active, scale, grad_y, grad_x)), (grad, _) in zip(
            _by_expert(ctx.rows, weights, *buffers), _by_expert(ctx.rows, grad_weights), strict=True
        ):
            torch.mm(grad_y.T, active, out=grad.fc2_weight)
            torch.sum(grad_y, 0, out=grad.fc2_bias)
            grad_hidden = grad_y @ expert.fc2_weight
            if scale is not None:
                grad_hidden.mul_(scale)
            grad_hidden = ACTIVATION_GRADS[ctx.activation](grad_hidden, hidden)
            torch.mm(grad_hidden.T, torch.addcmul(expert.shift, x, expert.gain), out=grad.fc1_weight)
            torch.sum(grad_hidden, 0, out=grad.fc1_bias)
            grad_normed = grad_hidden @ expert.fc1_weight
            torch.sum(grad_normed, 0, out=grad.shift)
            torch.sum(grad_normed * x, 0, out=grad.gain)
            torch.mul(grad_normed, expert.gain, out=grad_x)
        return grad_x_PD, None, None, None, *grad_weights


def _by_expert(
    rows: list[int], weights: Iterable[Tensor], *buffers_PX: Tensor | None
) -> list[tuple[ExpertWeights, list[Any]]]:
    """For each expert that has rows, its weights and its rows of each buffer, which may go on after all experts'."""
    experts = zip(*(stack.unbind(0) for stack in weights), strict=True)
    used = sum(rows)
    parts = [itertools.repeat(None) if buffer is None else buffer[:used].split(rows) for buffer in buffers_PX]
    return [
        (ExpertWeights(*expert), part) for count, expert, *part in zip(rows, experts, *parts, strict=False) if count
    ]
