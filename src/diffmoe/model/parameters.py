"""How many parameters a model has, and how many of them one token meets."""

from __future__ import annotations

from torch import nn

from diffmoe.model.moe import routed_pools
from diffmoe.model.routers import Mixer


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and active for one token: of each pool that sends tokens only top_k experts are."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        sum(stack.numel() for stack in pool.weights) * (len(pool.gain) - pool.router.top_k) // len(pool.gain)
        for pool in routed_pools(model).values()
        if not isinstance(pool.router, Mixer)
    )
    return total, total - idle


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """As metrics.json has them."""
    total, active = count_parameters(model)
    return {"parameters_total": total, "parameters_active": active}
