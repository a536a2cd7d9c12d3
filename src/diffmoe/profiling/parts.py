"""The parts that a cost is told by: which of a model's modules belong to which.

A part is a name, in a tower or the fusion after its place: "image/attention", "fusion/router", "head". Routed experts:
with their norm and the dispatch, or the one wide expert of a dense model. Head: the task's and the projections to the
shared space. Other: positions, residual sums, norms and pooling between the stacks, the zero-shot comparison.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from diffmoe.model.moe import GeneralExperts

NAMES = {
    "patch_embed": "patch embedding",
    **dict.fromkeys(("token_embedding", "token_projection"), "text embedding"),
    **dict.fromkeys(("attention_norm", "attention"), "attention"),
    "router": "router",
    "general_experts": "routed experts",
    "global_expert": "global expert",
    "modality_expert": "modality expert",
    "FusionLayer": "cross-attention",
    **dict.fromkeys(("head", "image_projection", "text_projection", "output_projection", "Captioner"), "head"),
    **dict.fromkeys(("MultiModalMoE", "UnifiedModalEncoder"), "other"),
}
"""A module's class, or what the module around calls it -> its name; without one it is of the part around it."""
METHODS = {"losses": "losses", "logits": "head"}
"""Methods that are of another part than their module."""
ORDER = ["data loading", *dict.fromkeys(NAMES.values()), "losses", "optimizer"]


def module_parts(module: nn.Module, name: str = "", around: str = "other") -> Iterator[tuple[nn.Module, str]]:
    """Each module within, itself first, and its part."""
    place, _, part = around.rpartition("/")
    part = NAMES.get(type(module).__name__) or NAMES.get(name, part)
    part = f"{getattr(module, 'place', place)}/{part}".lstrip("/")
    yield module, part
    for child_name, child in module.named_children():
        yield from module_parts(child, child_name, part)


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
