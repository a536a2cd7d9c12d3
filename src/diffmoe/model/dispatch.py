"""Tokens to their experts and back: a plan's slots are placed in rows, expert after expert, and gathered back.

A backend is how slots are placed and how the rows are run (`experts`); all share `gather` and `combine`, and give
y_t = sum over k of gate_tk * expert_{id_tk}(x_t). A slot is one (token, k); one with the id E (no expert) has the
gate 0 and adds nothing.

Shapes: T tokens, D width, E experts, K experts chosen for a token, S = T * K slots, P rows (the slots, and padding).
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.model.experts import (
    MIN_ROWS,
    ExpertWeights,
    Rows,
    RunExperts,
    batched_experts,
    grouped_experts,
    looped_experts,
    why_not_grouped,
)
from diffmoe.model.routing import Plan

FEW_SLOTS = 256
"""Up to this many slots, one batched product over padded experts beats a product for each expert on a CPU."""
START_ROWS = 32
"""Running an expert by itself costs as much beside its rows as so many rows do, by measurement on a CPU."""


class Placement(NamedTuple):
    """Where the slots of a plan are in the rows that the experts get."""

    sources: Tensor
    """(P,) int64, the token of each row; any token where the row is padding, which is never gathered back."""
    slots: Tensor
    """(T, K) int64, the row of each slot."""
    rows: Rows
    """How many rows each expert has; what is left after them is nobody's."""


class LocalDispatch:
    """All experts are on this device.

    Args:
        backend: a name of `BACKENDS`, or "auto": the fastest for the device, dtype and number of slots.
    """

    def __init__(self, backend: str = "auto") -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}: it must be auto or one of {', '.join(BACKENDS)}")
        self.backend = backend

    def __call__(self, x_TD: Tensor, plan: Plan, weights: ExpertWeights, activation: str, dropout: float) -> Tensor:
        """Rows to the experts and back, (T, D) -> (T, D); all floats of one dtype.

        Raises `UserError` where the backend cannot run here.
        """
        name = choose_backend(x_TD, plan.expert_ids.numel(), weights) if self.backend == "auto" else self.backend
        if reason := why_not(name, x_TD, weights):
            able = [other for other in BACKENDS if why_not(other, x_TD, weights) is None]
            raise UserError(f"expert_backend {name!r} cannot run here: {reason}; {', '.join(able)} and auto can")
        place, run = BACKENDS[name]
        placement = place(plan)
        y_PD = run(gather(x_TD, placement), placement.rows, weights, activation, dropout)
        return combine(y_PD, plan.gates, placement)


def choose_backend(x_TD: Tensor, num_slots: int, weights: ExpertWeights) -> str:
    """The fastest backend for this device, dtype and number of slots; one without data-dependent shapes for export."""
    if torch.compiler.is_exporting():
        return "masked"
    if x_TD.is_cuda or torch.compiler.is_compiling():
        if why_not("grouped", x_TD, weights) is None:
            return "grouped"  # no count leaves the device, so that a compiler sees one graph
        if torch.compiler.is_compiling():
            return "masked"
    return "padded" if num_slots <= FEW_SLOTS else "sorted"


def why_not(backend: str, x_TD: Tensor, weights: ExpertWeights) -> str | None:
    """What keeps `backend` from running on these tensors here; None where nothing does."""
    return why_not_grouped(x_TD, weights) if backend == "grouped" else None


def place_sorted(plan: Plan) -> Placement:
    """Slots sorted by expert, each expert's rows rounded up to a multiple of a power of two.

    Products of a new shape are slow: oneDNN builds a kernel for each, and routing changes at every step.
    """
    num_slots, num_experts = plan.expert_ids.numel(), len(plan.tokens_per_expert)
    ids_S = plan.expert_ids.flatten()
    order_S = ids_S.argsort(stable=True)
    count_E = torch.cat([plan.tokens_per_expert, (num_slots - plan.tokens_per_expert.sum())[None]])  # and nowhere
    multiple = row_multiple(num_slots, num_experts)
    row_count_E = (count_E + multiple - 1) // multiple * multiple
    # A slot moves down by the padding of all experts before its own.
    padding_before_E = (row_count_E - count_E).cumsum(0) - (row_count_E - count_E)
    row_S = torch.arange(num_slots, device=ids_S.device) + padding_before_E[ids_S[order_S]]
    rows = row_count_E.tolist()  # the one synchronisation with the device
    source_P = ids_S.new_zeros(sum(rows)).index_copy_(0, row_S, order_S // plan.expert_ids.shape[1])
    slot_S = torch.empty_like(row_S).index_copy_(0, order_S, row_S)
    return Placement(source_P, slot_S.view_as(plan.expert_ids), rows[:-1])


def row_multiple(num_slots: int, num_experts: int) -> int:
    """A power of two from MIN_ROWS to 256 that pads an average expert's rows by about a thirty-second."""
    sixteenth = num_slots // (16 * num_experts)  # of an average expert's rows; rounding up adds half of it on average
    return min(256, max(MIN_ROWS, (1 << sixteenth.bit_length()) >> 1))


def place_few(plan: Plan) -> Placement:
    """Experts padded to the fullest one, or by themselves: a handful of slots.

    In Python: for so few that is faster than a dozen operations on tensors. Slots that go nowhere share one row.
    """
    num_experts, top_k = len(plan.tokens_per_expert), plan.expert_ids.shape[1]
    ids = plan.expert_ids.flatten().tolist()  # the one synchronisation with the device
    counts = [0] * (num_experts + 1)
    for expert in ids:
        counts[expert] += 1
    nowhere = counts.pop() > 0
    rows = few_rows(counts) if ids else counts
    free = list(itertools.accumulate(rows, initial=0))  # each expert's next row, and the one after all of them
    source, slots = [0] * (free[-1] + nowhere), []
    for number, expert in enumerate(ids):
        slots.append(free[expert])
        if expert < num_experts:
            source[free[expert]] = number // top_k
            free[expert] += 1
    # Through an array: torch.tensor takes ten times as long with a list.
    source_P, slot_S = (torch.frombuffer(array("q", ints or [0]), dtype=torch.int64) for ints in (source, slots))
    source_P, slot_S = source_P[: len(source)], slot_S[: len(slots)]
    device = plan.expert_ids.device
    return Placement(source_P.to(device), slot_S.to(device).view_as(plan.expert_ids), rows)


def few_rows(counts: list[int]) -> list[int]:
    """Slots of each expert -> its rows in `place_few`.

    Equally many for all, or, where that costs more, a multiple of twice MIN_ROWS of its own for each expert in use.
    """
    equal = -(-max(*counts, 1) // MIN_ROWS) * MIN_ROWS
    own = [-(-count // (2 * MIN_ROWS)) * 2 * MIN_ROWS for count in counts]
    cost = sum(own) + START_ROWS * (len(counts) - counts.count(0))
    return own if 0 < cost < equal * len(counts) else [equal] * len(counts)


def place_on_device(plan: Plan) -> Placement:
    """Slots sorted by expert, without padding; no count leaves the device."""
    num_experts = len(plan.tokens_per_expert)
    # Slots that go nowhere have the gate 0: wherever they go instead, they add nothing.
    ids_S = plan.expert_ids.flatten().clamp_max(num_experts - 1)
    order_S = ids_S.argsort(stable=True)
    slot_S = torch.empty_like(order_S).index_copy_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    count_E = F.pad(plan.tokens_per_expert[:-1], (0, 1), value=0)
    count_E[-1] = len(ids_S) - count_E.sum()
    return Placement(order_S // plan.expert_ids.shape[1], slot_S.view_as(plan.expert_ids), count_E)


def place_everywhere(plan: Plan) -> Placement:
    """Every token to every expert: E / K times the work, but shapes that depend on nothing.

    For export: ONNX has no stable sort, and a graph cannot hold shapes that depend on the data.
    """
    num_tokens, num_experts = len(plan.expert_ids), len(plan.tokens_per_expert)
    token_T = torch.arange(num_tokens, device=plan.expert_ids.device)
    expert_TK = plan.expert_ids.clamp_max(num_experts - 1)  # of no expert: any, as its gate is 0
    return Placement(token_T.repeat(num_experts), expert_TK * num_tokens + token_T[:, None], None)


BACKENDS: dict[str, tuple[Callable[[Plan], Placement], RunExperts]] = {
    "sorted": (place_sorted, looped_experts),
    "padded": (place_few, batched_experts),
    "grouped": (place_on_device, grouped_experts),
    "masked": (place_everywhere, batched_experts),
}
"""How slots are placed, and how the rows are run."""


def gather(x_TD: Tensor, placement: Placement) -> Tensor:
    """The tokens of the rows: (T, D) -> (P, D)."""
    if torch.compiler.is_exporting():
        return x_TD.index_select(0, placement.sources)
    return _Gather.apply(x_TD, placement.sources, placement.slots)


def combine(y_PD: Tensor, gates_TK: Tensor, placement: Placement) -> Tensor:
    """y_t = sum over k of gate_tk * y_PD[slot_tk]: (P, D), (T, K) -> (T, D)."""
    if torch.compiler.is_exporting():
        return _weighted_sum(y_PD, gates_TK, placement.slots)
    return _Combine.apply(y_PD, gates_TK, placement.sources, placement.slots)


def _weighted_sum(y_PD: Tensor, gates_TK: Tensor, slot_TK: Tensor) -> Tensor:
    y_TKD = y_PD.index_select(0, slot_TK.flatten()).unflatten(0, slot_TK.shape)
    return (gates_TK[:, None] @ y_TKD).squeeze(1)


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
        if grads[0].is_cpu and not torch.compiler.is_compiling():
            return F.embedding_bag(slot_TK, grads[0], mode="sum"), None, None
        return grads[0].index_select(0, slot_TK.flatten()).unflatten(0, slot_TK.shape).sum(1), None, None


class _Combine(torch.autograd.Function):
    """The weighted sum, and its gradient without scattered additions."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, gates_TK: Tensor, source_P: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_PD, gates_TK, source_P, slot_TK)
        if y_PD.is_cpu and not torch.compiler.is_compiling():
            return F.embedding_bag(slot_TK, y_PD, mode="sum", per_sample_weights=gates_TK)
        return _weighted_sum(y_PD, gates_TK, slot_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_PD, gates_TK, source_P, slot_TK = ctx.saved_tensors
        grad_PD = grads[0].index_select(0, source_P)
        grad_gates_TK = (grad_PD * y_PD).sum(-1).index_select(0, slot_TK.flatten()).view_as(gates_TK)
        # Rows of padding have the gate 0 here: nothing comes back through them.
        gate_P = gates_TK.new_zeros(len(y_PD)).index_copy_(0, slot_TK.flatten(), gates_TK.flatten())
        return grad_PD.mul_(gate_P[:, None]), grad_gates_TK, None, None
