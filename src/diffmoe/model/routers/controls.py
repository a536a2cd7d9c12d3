"""Routers that learn nothing: what the others must beat.

Shapes: N tokens of a sequence, D width, E experts, K experts chosen for a token; `...` any leading token axes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diffmoe.model.routers.base import Router
from diffmoe.model.routing import Routing


class _Unlearned(Router):
    """A control: where a token goes has nothing to do with what it is. All gates are equal."""

    causal = False  # where a token stands is not known while a caption is written token by token

    def reset_parameters(self) -> None:
        """It has none."""

    def choose(self, logits: Tensor, mask: Tensor | None) -> Routing:
        routing = super().choose(logits, mask)
        share = self.gate_scale / self.top_k
        gates = torch.full_like(routing.gates, share) * (routing.expert_ids < logits.shape[-1])
        return dataclasses.replace(routing, probs=torch.full_like(logits, 1 / logits.shape[-1]), gates=gates)

    def by_place(self, x: Tensor) -> Tensor:
        """(..., N, D) -> logits (..., N, E): the K experts after a number that its place alone decides."""
        num_experts = len(self.balance_bias)
        place = torch.arange(x.shape[-2], device=x.device)
        start = place * 2654435761 % 4294967296 // 65536 % num_experts  # Knuth's multiplicative hash
        distance = (torch.arange(num_experts, device=x.device) - start[:, None]) % num_experts
        return (-distance).to(torch.promote_types(x.dtype, torch.float32)).expand(*x.shape[:-1], -1)


class HashRouter(_Unlearned):
    """Hash routing: a token's place decides (Roller et al. 2021, "Hash layers"). Args: as `Router`."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        return self.choose(self.by_place(x), mask)


class RandomRouter(_Unlearned):
    """Other experts at every step of training, by place in evaluation. Args: as `Router`."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        if not self.training:
            return self.choose(self.by_place(x), mask)
        return self.choose(torch.rand(*x.shape[:-1], len(self.balance_bias), device=x.device), mask)
