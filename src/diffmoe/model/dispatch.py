"""Tokens to their experts and back: interchangeable backends, each one function, for the same sum over experts.

All compute y_t = sum over k of gate_tk * expert_{id_tk}(x_t), where an expert is gain, shift, Linear, activation,
Linear, with stacked weights. A slot is one (token, k); one with the id E (no expert) has the gate 0 and adds nothing.

Shapes: T tokens, D width, E experts, K experts chosen for a token, F hidden width of an expert, S = T * K slots,
C rows of each expert, P rows of all.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.model.layers import ACTIVATIONS
from diffmoe.model.sorted_rows import MIN_ROWS, ExpertWeights, by_expert, sorted_experts

FEW_SLOTS = 256
"""Up to this many slots, one batched product over padded experts beats a product for each expert on a CPU."""
START_ROWS = 32
"""Running an expert by itself costs as much beside its rows as so many rows do, by measurement on a CPU."""

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
        halves = [(x.view(2, -1, width), expert) for expert, (x,) in by_expert(rows, weights, x_PD)]
        y_PD = torch.cat([_all_experts(*half, activation, dropout).flatten(0, 1) for half in halves])
    if nowhere:
        y_PD = F.pad(y_PD, (0, 0, 0, nowhere))
    y_TKD = y_PD.index_select(0, slot_TK.flatten()).view(*slot_TK.shape, width)
    return (y_TKD * gates_TK[..., None]).sum(1)


def _place_slots(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Where each row comes from, (P,) tokens; where each slot went, (T, K) rows; and each expert's number of rows.

    The last of these is 1 where slots go nowhere: they share one row after all others, which has no source.
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
