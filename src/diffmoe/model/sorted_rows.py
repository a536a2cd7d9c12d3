"""The experts as a loop over contiguous rows: the `sorted` backend of `dispatch`, with its backward by hand.

Shapes: T tokens, D width, E experts, K experts chosen for a token, F hidden width of an expert, S = T * K slots (one
token and one of its k), P rows of the sorted buffer (the slots, ordered by expert, and padding between experts).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16
"""An expert's rows are padded to a multiple of this: products of fewer rows take other kernels, which round otherwise,
and then a token's output would depend, in its last bits, on how many others its expert was given."""


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


def sorted_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """Sort the slots by expert, run each expert on its own contiguous rows, gather back with the gates: CPUs.

    Each expert's rows are rounded up to a multiple of a power of two: oneDNN builds a kernel for every new shape, and
    routing that changes at every step would otherwise bring new shapes at every step.
    """
    num_experts, hidden = weights.fc1_bias.shape
    source_P, slot_TK, rows = _sort_slots(expert_ids_TK, num_experts)
    x_PD = _Gather.apply(x_TD, source_P, slot_TK)
    scale_PF = F.dropout(x_TD.new_ones(len(source_P), hidden), dropout) if dropout > 0 else None
    y_PD = _RunExperts.apply(x_PD, rows, activation, scale_PF, *weights)
    if dropout > 0:
        y_PD = F.dropout(y_PD, dropout)
    return _Combine.apply(y_PD, gates_TK, source_P, slot_TK)


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
    multiple = row_multiple(num_slots, num_experts)
    row_count_E = (count_E + multiple - 1) // multiple * multiple
    # A slot moves down by the padding of all experts before its own.
    padding_before_E = (row_count_E - count_E).cumsum(0) - (row_count_E - count_E)
    row_S = torch.arange(num_slots, device=ids_S.device) + padding_before_E[ids_S[order_S]]
    rows = row_count_E.tolist()  # the one synchronisation with the device
    source_P = ids_S.new_zeros(sum(rows)).index_copy_(0, row_S, order_S // expert_ids_TK.shape[1])
    slot_S = torch.empty_like(row_S).index_copy_(0, order_S, row_S)
    return source_P, slot_S.view_as(expert_ids_TK), rows


def row_multiple(num_slots: int, num_experts: int) -> int:
    """A power of two from MIN_ROWS to 256 that pads an average expert's rows by about a thirty-second."""
    sixteenth = num_slots // (16 * num_experts)  # of an average expert's rows; rounding up adds half of it on average
    return min(256, max(MIN_ROWS, (1 << sixteenth.bit_length()) >> 1))


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
        return F.embedding_bag(slot_TK, grads[0], mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """y_t = sum over k of gate_tk * y_PD[slot_tk], and its gradient without scattered additions."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, gates_TK: Tensor, source_P: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_PD, gates_TK, source_P, slot_TK)
        return F.embedding_bag(slot_TK, y_PD, mode="sum", per_sample_weights=gates_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_PD, gates_TK, source_P, slot_TK = ctx.saved_tensors
        grad_PD = grads[0].index_select(0, source_P)
        grad_gates_TK = (grad_PD * y_PD).sum(-1).index_select(0, slot_TK.flatten()).view_as(gates_TK)
        gate_P = gates_TK.new_zeros(len(y_PD)).index_copy_(0, slot_TK.flatten(), gates_TK.flatten())
        return grad_PD.mul_(gate_P[:, None]), grad_gates_TK, None, None


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
        for expert, (x, hidden, active, scale, y) in by_expert(
            rows, weights, x_PD, hidden_PF, active_PF, scale_PF, y_PD
        ):
            torch.addmm(expert.fc1_bias, torch.addcmul(expert.shift, x, expert.gain), expert.fc1_weight.T, out=hidden)
            ACTIVATIONS_OUT[activation](hidden, out=active)
            if scale is not None:
                active.mul_(scale)
            torch.addmm(expert.fc2_bias, active, expert.fc2_weight.T, out=y)
        y_PD[sum(rows[:-1]) :].zero_()
        ctx.save_for_backward(x_PD, hidden_PF, active_PF, scale_PF, *weights)
        ctx.rows, ctx.activation = rows, activation
        return y_PD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, hidden_PF, active_PF, scale_PF, *weights = ctx.saved_tensors
        grad_x_PD = torch.empty_like(x_PD)
        grad_x_PD[sum(ctx.rows[:-1]) :].zero_()
        grad_weights = [torch.empty_like(weight) for weight in weights]
        for number, count in enumerate(ctx.rows[:-1]):
            if not count:
                for grad in grad_weights:
                    grad[number].zero_()
        buffers = (x_PD, hidden_PF, active_PF, scale_PF, grads[0], grad_x_PD)
        for (expert, (x, hidden, active, scale, grad_y, grad_x)), (grad, _) in zip(
            by_expert(ctx.rows, weights, *buffers), by_expert(ctx.rows, grad_weights), strict=True
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


def by_expert(
    rows: list[int], weights: Iterable[Tensor], *buffers_PX: Tensor | None
) -> list[tuple[ExpertWeights, list[Any]]]:
    """For each expert that has rows, its weights and its rows of each buffer; `rows` may go on after the experts'."""
    experts = zip(*(stack.unbind(0) for stack in weights), strict=True)
    parts = [itertools.repeat(None) if buffer is None else buffer.split(rows) for buffer in buffers_PX]
    return [
        (ExpertWeights(*expert), part) for count, expert, *part in zip(rows, experts, *parts, strict=False) if count
    ]
