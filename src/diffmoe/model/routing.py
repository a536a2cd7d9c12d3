"""What a router decided: the plan that a dispatcher follows, and all that is drawn, measured or penalised of it.

Shapes: T tokens, E experts, K experts chosen for a token; `...` any leading token axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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

    def shaped(self, shape: Sequence[int]) -> Routing:
        """The same of tokens whose axes are `shape`."""
        per_token = {name: getattr(self, name) for name in ("logits", "probs", "gates", "expert_ids")}
        mask = None if self.mask is None else self.mask.reshape(shape)
        shaped = {name: value.reshape(*shape, value.shape[-1]) for name, value in per_token.items()}
        return dataclasses.replace(self, **shaped, mask=mask)

    @property
    def plan(self) -> Plan:
        """Of all tokens, one after the other."""
        return Plan(self.expert_ids.flatten(0, -2), self.gates.flatten(0, -2), self.tokens_per_expert)


def count_tokens(expert_ids: Tensor, num_experts: int) -> Tensor:
    """(..., K) int64 -> (E,) int64, how often each of the experts is there; E, no expert, is not counted.

    On the device and of a known shape: nothing waits, and a compiler goes on.
    """
    ids_S = expert_ids.flatten()
    return ids_S.new_zeros(num_experts + 1).scatter_add_(0, ids_S, torch.ones_like(ids_S))[:num_experts]


def at(routing: Routing, place: str, layer: int) -> Routing:
    """The same, with where its block sits."""
    return dataclasses.replace(routing, place=place, layer=layer)
