"""Who goes where: a router turns tokens into a `Routing`, whose plan says which experts each token is sent to.

A router is chosen by its name in `ROUTERS`; another one is one more class, and its name here.
"""

from __future__ import annotations

from diffmoe.config import UserError, nearest
from diffmoe.model.routers.attentive import AttentiveRouter, ExpertChoiceRouter, PictureRouter
from diffmoe.model.routers.base import Router
from diffmoe.model.routers.controls import HashRouter, RandomRouter
from diffmoe.model.routers.mixers import MergedRouter, Mixer, SoftRouter

__all__ = ["ROUTERS", "AttentiveRouter", "Mixer", "Router", "router_kind"]

ROUTERS: dict[str, type[Router]] = {
    "attentive": AttentiveRouter,
    "picture": PictureRouter,
    "expert_choice": ExpertChoiceRouter,
    "merged": MergedRouter,
    "soft": SoftRouter,
    "hash": HashRouter,
    "random": RandomRouter,
}
"""By the name that `ModelConfig.router` gives."""


def router_kind(name: str) -> type[Router]:
    """The router of that name. Raises `UserError` where there is none."""
    if name not in ROUTERS:
        raise UserError(f"router is {name!r}: it must be one of {', '.join(ROUTERS)}{nearest(name, ROUTERS)}")
    return ROUTERS[name]
