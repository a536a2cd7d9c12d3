"""Pools in float64 and what they must compute, by definition."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.model.experts import ExpertWeights
from diffmoe.model.moe import GeneralExperts

WIDTH = 6
M = TypeVar("M", bound=nn.Module)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomize(module: M) -> M:
    """In float64, with every parameter away from the zeros and ones that would hide a missing term."""
    module.double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * randn(*parameter.shape, seed=seed))
    return module


def make_pool(num_experts: int = 4, top_k: int = 2, dropout: float = 0.0, seed: int = 0) -> GeneralExperts:
    """In float64, with every parameter away from the zeros and ones that would hide a missing term."""
    pool = GeneralExperts(WIDTH, num_experts, top_k, expansion_factor=2, dropout=dropout).double()
    with torch.no_grad():
        for number, parameter in enumerate(pool.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + number))
    return pool


def by_definition(x: Tensor, expert_ids: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
    """Every expert on every token, weighted with its gate, which is 0 where it was not chosen."""
    y = torch.zeros_like(x)
    for number in range(len(weights.gain)):
        gain, shift, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (w[number] for w in weights)
        out = F.gelu((x * gain + shift) @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias
        y = y + (gates * (expert_ids == number)).sum(-1, keepdim=True) * out
    return y
