"""The parts that a cost is told by: which of a model's modules belong to which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from diffmoe.model.encoders import FusionLayer, UnifiedModalEncoder
from diffmoe.model.layers import PatchEmbed
from diffmoe.model.moe import GeneralExperts


class Part(NamedTuple):
    """A piece of the work."""

    place: str
    """image, text or fusion; empty where it is of no tower."""
    name: str
    """One of `NAMES`."""


LOADING, OPTIMIZER, LOSSES, HEAD, OTHER = (
    Part("", name) for name in ("data loading", "optimizer", "losses", "head", "other")
)
"""Head: the task's and the projections to the shared space. Other: positions, norms and pooling between the stacks, the
zero-shot comparison, and Python between the operations."""
NAMES = (
    *("data loading", "patch embedding", "text embedding", "attention", "router", "dispatch", "routed experts"),
    *(
        "global expert",
        "modality expert",
        "cross-attention",
        "residual",
        "head",
        "losses",
        "optimizer",
        "idle",
        "other",
    ),
)
"""In the order of the tables. Attention: with its norm. Dispatch: to the experts and back. Routed experts: those of the
pool with their shared norm, or the one wide expert of a dense model. Residual: the sums of a block. Idle: a GPU's."""
POOL = "routed pool"
"""The range of a routed pool, which is one module: its experts' arithmetic is told from dispatch by the operation."""


def module_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Part]]:
    """Each module that a part begins with, by its name in `model`; a part ends where another one begins inside."""
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, PatchEmbed):
            yield name, module, Part("image", "patch embedding")
        elif leaf in ("token_embedding", "token_projection"):
            yield name, module, Part("text", "text embedding")
        elif isinstance(module, UnifiedModalEncoder):
            yield name, module, Part(module.place, "residual")
            for child, part in BLOCK_PARTS.items():
                if (inner := getattr(module, child)) is not None:
                    pooled = part == "routed experts" and isinstance(inner, GeneralExperts)
                    yield f"{name}.{child}", inner, Part(module.place, POOL if pooled else part)
                    if pooled:
                        yield f"{name}.{child}.router", inner.router, Part(module.place, "router")
        elif isinstance(module, FusionLayer):
            yield name, module, Part("fusion", "cross-attention")
        elif leaf in ("head", "image_projection", "text_projection", "output_projection"):
            yield name, module, HEAD


BLOCK_PARTS = {
    "attention_norm": "attention",
    "attention": "attention",
    "general_experts": "routed experts",
    "global_expert": "global expert",
    "modality_expert": "modality expert",
}
"""A block's children, in no other module's care."""


def part_of_parameter(name: str, starts: dict[str, Part]) -> Part:
    """The part of the parameter called `name`, given `module_parts` as name -> part."""
    if name == "output_bias":
        return HEAD
    prefix = name
    while "." in prefix:
        prefix = prefix.rsplit(".", 1)[0]
        if prefix in starts:
            part = starts[prefix]
            return Part(part.place, "routed experts") if part.name == POOL else part
    return OTHER


def in_order(part: Part) -> tuple[int, str]:
    """Sort key: as `NAMES`, the image tower first."""
    return NAMES.index(part.name), {"image": "0", "text": "1", "fusion": "2"}.get(part.place, "")
