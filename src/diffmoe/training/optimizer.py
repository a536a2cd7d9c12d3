"""The optimizer, and its learning rate over time."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW

from diffmoe.config import TrainingConfig
from diffmoe.model.moe import routed_pools
from diffmoe.training.muon import Muon

MOMENTUM = 0.95
"""Muon's."""
BLOCKS = ("image_encoder.", "text_encoder.", "fusion.")
"""Where Muon has the layers' weights."""
NOT_BY_MUON = ("keys", "noise.weight")
"""Weights in blocks that are no maps from tokens to tokens: a router's table of experts, and how much it is shaken."""


def learning_rate(step: float, total_steps: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear rise to the peak, then a cosine down.

    It is `lr`'s; that of a parameter group is `scale` times as large. A step may lie between two, where time says how
    far training is.
    """
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.lr * min((step + 1) / warmup, 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    floor = config.final_lr_fraction
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """Of all weights that are not frozen: AdamW, fused; with optimizer 'muon' `Muon` for the layers' weights.

    Weight decay is on matrices only: not on biases, norms, embeddings or positions. Each parameter group has its
    `scale`: its peak learning rate over `lr`.
    """
    pools = routed_pools(model).values()
    experts = {id(weight) for pool in pools for weight in pool.parameters()}
    experts -= {id(weight) for pool in pools for weight in pool.router.parameters()}
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = _is_matrix(name, parameter)
        by_muon = config.optimizer == "muon" and is_matrix and _is_layer(name, parameter)
        scale = (config.muon_lr / config.lr if by_muon else 1.0) * (
            config.expert_lr_scale if id(parameter) in experts else 1.0
        )
        groups.setdefault((is_matrix, by_muon, scale), []).append(parameter)
    made: list[dict[str, Any]] = []
    for (is_matrix, by_muon, scale), parameters in groups.items():
        decay = config.weight_decay if is_matrix else 0.0
        group = {"params": parameters, "lr": scale * config.lr, "scale": scale, "weight_decay": decay}
        made.append(group | ({"momentum": MOMENTUM} if by_muon else {}))
    kind = Muon if config.optimizer == "muon" else AdamW
    return kind(made, lr=config.lr, betas=(0.9, 0.98), fused=True)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    # The routed experts stack E vectors into a matrix: the leaf's name tells a bias from a weight.
    is_weight = leaf == "weight" or leaf.endswith("_weight") or leaf == "keys"
    return parameter.dim() >= 2 and is_weight and "embedding" not in name


def _is_layer(name: str, parameter: nn.Parameter) -> bool:
    """Whether a matrix maps features to features: a convolution or a block's layer; no embedding, no head."""
    in_block = any(part in name for part in BLOCKS) and not name.endswith(NOT_BY_MUON)
    return parameter.dim() == 4 or in_block
