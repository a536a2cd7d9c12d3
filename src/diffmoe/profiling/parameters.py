"""How many parameters a model has, and how many of them one token meets."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from diffmoe.model.moe import GeneralExperts
from diffmoe.profiling.parts import Part, module_parts, part_of_parameter


class Count(NamedTuple):
    """Parameters of one part."""

    total: int
    active: int
    """Those that one token meets: of each routed pool only top_k experts."""


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and active for one token: of each routed pool only top_k experts are."""
    counts = count_by_part(model).values()
    return sum(count.total for count in counts), sum(count.active for count in counts)


def count_by_part(model: nn.Module) -> dict[Part, Count]:
    """Parameters of each part; those of the pool are its experts', the router's are apart."""
    starts = {name: part for name, _, part in module_parts(model)}
    idle_shares = dict(_idle_shares(model))
    counts: dict[Part, Count] = {}
    for name, parameter in model.named_parameters():
        part = part_of_parameter(name, starts)
        total, active = counts.get(part, Count(0, 0))
        idle, experts = idle_shares.get(name, (0, 1))
        size = parameter.numel()
        counts[part] = Count(total + size, active + size - size // experts * idle)
    return counts


def _idle_shares(model: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    """Of each stacked parameter of a pool: how many of its experts a token does not meet, and how many there are."""
    return [
        (f"{name}.{stack}" if name else stack, (len(pool.gain) - pool.router.top_k, len(pool.gain)))
        for name, pool in model.named_modules()
        if isinstance(pool, GeneralExperts)
        for stack, _ in pool.named_parameters()
        if not stack.startswith("router.")
    ]
