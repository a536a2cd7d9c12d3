"""How many parameters a model has, and how many of them one token meets: of each routed pool only top_k experts."""

from __future__ import annotations

from torch import nn

from diffmoe.model.moe import GeneralExperts
from diffmoe.profiling.parts import module_parts


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters in all, and active for one token."""
    total, active = zip((0, 0), *count_by_part(model).values(), strict=True)
    return sum(total), sum(active)


def count_by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters of each part in all, and active for one token."""
    parts, counts = dict(module_parts(model)), dict[str, tuple[int, int]]()
    for name, parameter in model.named_parameters():
        module, size = model.get_submodule(name.rpartition(".")[0]), parameter.numel()
        # A pool's own parameters are stacks of E, one for each expert.
        met = size // len(parameter) * module.router.top_k if isinstance(module, GeneralExperts) else size
        total, active = counts.get(parts[module], (0, 0))
        counts[parts[module]] = (total + size, active + met)
    return counts
