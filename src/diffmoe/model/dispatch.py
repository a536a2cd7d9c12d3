"""Tokens to their experts and back: interchangeable backends, each one function, for the same sum over experts.

All compute y_t = sum over k of gate_tk * expert_{id_tk}(x_t), where an expert is gain, shift, Linear, activation,
Linear, with stacked weights. A slot is one (token, k); one with the id E (no expert) has the gate 0 and adds nothing.

Shapes: T tokens, D width, E experts, K experts chosen for a token, F hidden width of an expert, S = T * K slots,
P rows of the sorted buffer (the slots, ordered by expert, and padding between experts).
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.model.layers import ACTIVATIONS

FEW_SLOTS = 256
"""Up to this many slots, one batched product over padded experts beats a product for each expert on a CPU."""
MIN_ROWS = 16
"""An expert's rows are padded to a multiple of this: products of fewer rows take other kernels, which round otherwise,
and then a token's output would depend, in its last bits, on how many others its expert was given."""
START_ROWS = 32
"""Running an expert by itself costs as much beside its rows as so many rows do, by measurement on a CPU."""


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


Backend = Callable[[Tensor, Tensor, Tensor, ExpertWeights, str, float], Tensor]
"""x_TD, expert_ids_TK int64, gates_TK, weights, activation, dropout -> y_TD; all floats of one dtype."""


def choose_backend(x_TD: Tensor, num_slots: int, weights: ExpertWeights) -> str:
    """The fastest backend for this device, dtype and number of slots; one without data-dependent shapes for export."""
    if torch.compiler.is_exporting():
        return "masked"
    if x_TD.is_cuda and why_not("grouped", x_TD, weights) is None:
        return "grouped"
    return "padded" if num_slots <= FEW_SLOTS else "sorted"


def why_not(backend: str, x_TD: Tensor, weights: ExpertWeights) -> str | None:
    """What keeps `backend` from running on these tensors here; None where nothing does."""
    if backend != "grouped":
        return None
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if x_TD.dtype == torch.float64:
        return "grouped_mm takes no float64"
    if x_TD.is_cuda and x_TD.dtype != torch.bfloat16:
        return f"on a GPU grouped_mm takes bfloat16, not {x_TD.dtype} (precision bf16-mixed)"
    if x_TD.is_cuda and torch.cuda.get_device_capability(x_TD.device) < (8, 0):
        return "grouped_mm needs a GPU of compute capability 8.0 or more"
    for width in weights.fc1_weight.shape[1:]:
        if width * x_TD.element_size() % 16:
            return f"grouped_mm needs widths of a multiple of 16 bytes, which {width} of {x_TD.dtype} is not"
    return None


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
        for expert, (x, hidden, active, scale, y) in _by_expert(
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
    """For each expert that has rows, its weights and its rows of each buffer; `rows` may go on after the experts'."""
    experts = zip(*(stack.unbind(0) for stack in weights), strict=True)
    parts = [itertools.repeat(None) if buffer is None else buffer.split(rows) for buffer in buffers_PX]
    return [
        (ExpertWeights(*expert), part) for count, expert, *part in zip(rows, experts, *parts, strict=False) if count
    ]


def padded_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """Pad all experts to the fullest one and run them in one batched product: a handful of tokens.

    Where that would be padding for the most part, as when all tokens go to one expert, each expert runs by itself.
    """
    num_tokens, width = x_TD.shape
    if not num_tokens:
        return x_TD.clone()
    source_P, slot_TK, (*rows, nowhere) = _place_slots(expert_ids_TK, len(weights.gain))
    x_PD = x_TD.index_select(0, source_P)
    if len(set(rows)) == 1:
        y_PD = _all_experts(x_PD.view(len(rows), -1, width), weights, activation, dropout).flatten(0, 1)
    else:
        # Two halves of an expert's rows: a batched product again, which rounds as that of all experts does.
        halves = [(x.view(2, -1, width), expert) for expert, (x,) in _by_expert(rows, weights, x_PD)]
        y_PD = torch.cat([_all_experts(*half, activation, dropout).flatten(0, 1) for half in halves])
    if nowhere:
        y_PD = F.pad(y_PD, (0, 0, 0, nowhere))
    y_TKD = y_PD.index_select(0, slot_TK.flatten()).view(*slot_TK.shape, width)
    return (y_TKD * gates_TK[..., None]).sum(1)


def _place_slots(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """As `_sort_slots`, but those that go nowhere share one row, the last, which has no source.

    In Python: for a handful of slots that is faster than a dozen operations on tensors.
    """
    ids = expert_ids_TK.flatten().tolist()  # the one synchronisation with the device
    counts = [0] * (num_experts + 1)
    for expert in ids:
        counts[expert] += 1
    nowhere = counts.pop() > 0
    rows = few_rows(counts)
    free = list(itertools.accumulate(rows, initial=0))  # each expert's next row, and the one after all of them
    source, slots = [0] * free[-1], []
    for number, expert in enumerate(ids):
        slots.append(free[expert])
        if expert < num_experts:
            source[free[expert]] = number // expert_ids_TK.shape[1]
            free[expert] += 1
    # Through an array: torch.tensor takes ten times as long with a list.
    source_P, slot_S = (torch.frombuffer(array("q", ints), dtype=torch.int64) for ints in (source, slots))
    device = expert_ids_TK.device
    return source_P.to(device), slot_S.to(device).view_as(expert_ids_TK), [*rows, int(nowhere)]


def few_rows(counts: list[int]) -> list[int]:
    """Slots of each expert -> its rows in `padded_experts`.

    Equally many for all, or, where that costs more, a multiple of twice MIN_ROWS of its own for each expert in use.
    """
    equal = -(-max(*counts, 1) // MIN_ROWS) * MIN_ROWS
    own = [-(-count // (2 * MIN_ROWS)) * 2 * MIN_ROWS for count in counts]
    cost = sum(own) + START_ROWS * (len(counts) - counts.count(0))
    return own if 0 < cost < equal * len(counts) else [equal] * len(counts)


def masked_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """Every expert on every token, weighted by the gate or 0: E / K times the work, but shapes that depend on nothing.

    For export: ONNX has no stable sort, and a graph cannot hold shapes that depend on the data.
    """
    num_experts = weights.gain.shape[0]
    chosen_TKE = F.one_hot(expert_ids_TK, num_experts + 1)[..., :num_experts].to(gates_TK.dtype)
    y_ETD = _all_experts(x_TD.expand(num_experts, *x_TD.shape), weights, activation, dropout)
    return _weighted_sum(y_ETD.transpose(0, 1), (gates_TK[:, None] @ chosen_TKE).squeeze(1))


def _all_experts(x_ECD: Tensor, weights: ExpertWeights, activation: str, dropout: float) -> Tensor:
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


def _weighted_sum(y_TKD: Tensor, gates_TK: Tensor) -> Tensor:
    return (gates_TK[:, None] @ y_TKD).squeeze(1)


def grouped_experts(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """The sorted layout through torch's grouped_mm: GPUs in bfloat16. No count ever leaves the device."""
    num_experts = weights.gain.shape[0]
    # Slots that go nowhere have the gate 0: wherever they go instead, they add nothing.
    ids_S = expert_ids_TK.flatten().clamp_max(num_experts - 1)
    order_S = ids_S.argsort(stable=True)
    slot_S = torch.empty_like(order_S).index_copy_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    ends_E = F.one_hot(ids_S, num_experts).sum(0).cumsum(0).to(torch.int32)
    x_SD = x_TD.index_select(0, order_S // expert_ids_TK.shape[1])
    # A row's own gain, shift and biases, by a product with its one-hot expert: exact, and its gradient is a product
    # too, where indexing would add thousands of rows into the same few, one after the other.
    expert_SE = F.one_hot(ids_S[order_S], num_experts).to(x_TD.dtype)
    x_SD = torch.addcmul(expert_SE @ weights.shift, x_SD, expert_SE @ weights.gain)
    hidden_SF = F.grouped_mm(x_SD, weights.fc1_weight.mT, offs=ends_E) + expert_SE @ weights.fc1_bias
    hidden_SF = ACTIVATIONS[activation](hidden_SF)
    if dropout > 0:
        hidden_SF = F.dropout(hidden_SF, dropout)
    y_SD = F.grouped_mm(hidden_SF, weights.fc2_weight.mT, offs=ends_E) + expert_SE @ weights.fc2_bias
    if dropout > 0:
        y_SD = F.dropout(y_SD, dropout)
    return _weighted_sum(y_SD.index_select(0, slot_S).unflatten(0, expert_ids_TK.shape), gates_TK)


BACKENDS: dict[str, Backend] = {
    "sorted": sorted_experts,
    "padded": padded_experts,
    "grouped": grouped_experts,
    "masked": masked_experts,
}
