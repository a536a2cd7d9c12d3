"""What a model costs."""

from __future__ import annotations

from torch import nn

from diffmoe.model.moe import GeneralExperts


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and active for one token: of each routed pool only top_k experts are."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for pool in model.modules():
        if isinstance(pool, GeneralExperts):
            num_experts = len(pool.gain)
            experts = sum(p.numel() for name, p in pool.named_parameters() if not name.startswith("router."))
            idle += experts // num_experts * (num_experts - pool.router.top_k)
    return total, total - idle
