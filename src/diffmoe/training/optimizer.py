"""The optimizer, and its learning rate over time."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW

from diffmoe.config import TrainingConfig


def learning_rate(step: float, total_steps: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear rise to the peak, then a cosine down.

    Between two steps, where time says how far training is.
    """
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.lr * min((step + 1) / warmup, 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    floor = config.final_lr_fraction
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """AdamW, fused, with weight decay on matrices only: not on biases, norms, embeddings or positions."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        # The routed experts stack E vectors into a matrix: the leaf's name tells a bias from a weight.
        is_matrix = parameter.dim() >= 2 and (leaf == "weight" or leaf.endswith("_weight") or leaf == "keys")
        (decayed if is_matrix and "embedding" not in name else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
