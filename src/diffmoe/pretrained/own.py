"""Starting from a model of our own: what fits is copied by name; a dense FFN becomes the experts of a routed pool.

Shapes: D width, E experts, K experts chosen for a token, F hidden units of the dense FFN, U those of an expert, n
slices of the FFN, T tokens.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import UserError
from diffmoe.model.heads import Classifier, Head
from diffmoe.model.layers import Expert, evaluating
from diffmoe.model.moe import GeneralExperts, routed_pools
from diffmoe.model.routers import AttentiveRouter, Mixer
from diffmoe.model.routers.attentive import PictureRouter
from diffmoe.model.routers.base import mean_token
from diffmoe.pretrained.parts import Part
from diffmoe.storage.model_files import load_model_file

CLUSTERED_TOKENS = 8192
"""Tokens of a pool that are clustered, at most."""
SEED = 0
"""Of the clusters."""
DRAWS = 4096
"""Tokens by which a fresh router's gates are estimated where they are probabilities."""


ABSENT = "is not in the file"
ALIKE = ("activation", "num_heads")
"""Fields without which weights of the same shapes compute something else."""


class Upcycled(NamedTuple):
    """How a pool was made of a dense FFN."""

    hidden: int
    """F."""
    experts: int
    """E."""
    units: int
    """U."""
    slices: int
    """n."""

    def __str__(self) -> str:
        needed = self.slices * self.units
        changed = f", the {needed} strongest kept," if needed < self.hidden else f", divided into {needed},"
        ffn = f"a dense FFN of {self.hidden} units{changed if needed != self.hidden else ''}"
        made = "copied into each of" if self.slices == 1 else f"cut into {self.slices} slices for"
        return f"{ffn} {made} {self.experts} experts of {self.units}"


@torch.no_grad()
def start_from_own(
    model: Head, source: str, pictures: Tensor | None = None, class_names: Sequence[str] = ()
) -> list[str]:
    """Copy into `model` what has a name and a shape in common with the model in a file; the rest keeps its own start.

    - What the data decides is no weight and stays: the descriptions of the classes, the words that can be written.
    - Of the classes' head the rows of those of the same name are copied.
    - `image_position` of another grid is interpolated (bicubic); of `text_position` the first rows are copied.
    - Where the file's block is dense and ours has a routed pool, the pool is made of that FFN: see `upcycle`. Its
      router, where it learns, starts at clusters of the tokens that reach the pool when the new model, in evaluation
      mode, sees `pictures`; without these, and where no token comes by, at random.

    Args:
        model: changed in place; not at all where this raises.
        source: a model file.
        pictures: (B, C, H, W) float, normalised; None clusters nothing.
        class_names: of the model's classes; empty: they are those of the file, where there are as many.

    Returns:
        A line for each part, copied or skipped, and why.

    Raises:
        UserError: for a file that is missing, damaged or of another kind, where nothing of it fits, or what fits would
            compute something else.
    """
    file = load_model_file(source)
    theirs = file.model
    for name in ALIKE if theirs.config.architecture == model.config.architecture else ():
        own, other = getattr(model.config, name), getattr(theirs.config, name)
        if own != other:
            raise UserError(f"init is {source!r}: its {name} is {other!r}, this model's {own!r}: give --{name} {other}")
    modules, pools = dict(theirs.named_modules()), routed_pools(model)
    upcycled: dict[str, Upcycled] = {}
    for name, pool in pools.items():
        ffn = modules.get(name)
        if isinstance(ffn, Expert) and ffn.fc1.in_features == pool.embed_dim:
            upcycled[name] = upcycle(pool, ffn, theirs.config.dense_scale)
    places = _places(class_names, file.data.class_names) if class_names and file.data.class_names else None
    parts = _copy(model, theirs.state_dict(), upcycled, places)
    if not any(part.copied for part in parts):
        raise UserError(f"init is {source!r}: nothing of it fits this model ({parts[0].name}: {parts[0].how})")
    lines = [str(part) for part in parts]
    if upcycled and pictures is not None:
        made = {name: pools[name] for name in upcycled}
        started = _start_routers(model, made, {name: how.slices for name, how in upcycled.items()}, pictures)
        lines.append(f"routers: {started} of {len(made)} start at clusters of tokens, of {len(pictures)} pictures")
    return lines


@torch.no_grad()
def upcycle(pool: GeneralExperts, ffn: Expert, scale: float = 1.0) -> Upcycled:
    """Make the experts of a pool of a dense FFN, whose output is times `scale` (sparse upcycling, Komatsuzaki et al.
    2022, section 3).

    The FFN is cut into n = F / U slices of its hidden units, to the nearest whole number from 1 to E; expert e gets
    slice e mod n. With n = 1 each is a copy. What an expert gives is so loud that with equal gates on the n slices the
    pool computes what the FFN did; its last bias, which every expert has, comes out once. Where F is not n U, the units
    that matter most, by |row of fc1| * |column of fc2|, are kept, or units are divided into two of half the output.

    Experts e of one e // n are a group: together they are the FFN. An attentive router starts with equal logits within
    a group, as the keys of one are equal, so that a token that chooses one of them chooses all (virtual groups, He et
    al. 2024, arXiv 2410.07524). Where n divides K and E, and no unit was left out, the pool then computes the FFN for
    every token, whatever else the router says. Not where gates are probabilities (K = 1, expert choice): there it does
    so on average, as they are while the router is fresh. Experts whose weights are averaged (`merged`) are copies.

    Args:
        pool: changed in place, router and all.
        ffn: of the same D, activation and dropout.
        scale: as the config's dense_scale.
    """
    experts, units, _ = pool.fc1_weight.shape
    hidden = ffn.fc1.out_features
    must_be_alike = isinstance(pool.router, Mixer) and pool.router.alike
    slices = 1 if must_be_alike else min(max(1, round(hidden / units)), experts)
    chosen = _units(ffn, slices * units)
    times = torch.bincount(chosen, minlength=hidden)[chosen]  # a unit that is there twice gives half each time
    loudness = scale / gates_sum(pool)
    slice_E = torch.arange(experts) % slices
    fc2_DF = ffn.fc2.weight[:, chosen] / times * (loudness * slices)
    pool.gain.copy_(ffn.norm.weight)
    pool.shift.copy_(ffn.norm.bias)
    pool.fc1_weight.copy_(ffn.fc1.weight[chosen].unflatten(0, (slices, units))[slice_E])
    pool.fc1_bias.copy_(ffn.fc1.bias[chosen].unflatten(0, (slices, units))[slice_E])
    pool.fc2_weight.copy_(fc2_DF.unflatten(1, (slices, units)).transpose(0, 1)[slice_E])
    pool.fc2_bias.copy_(ffn.fc2.bias * loudness)
    if isinstance(pool.router, AttentiveRouter):
        keys = pool.router.keys
        keys.copy_(keys[torch.arange(experts) // slices * slices])
    return Upcycled(hidden, experts, units, slices)


def _units(ffn: Expert, needed: int) -> Tensor:
    """Which hidden units to take, (needed,) int64: the strongest; all, over and over, where there are fewer."""
    strength_F = ffn.fc1.weight.norm(dim=1) * ffn.fc2.weight.norm(dim=0)
    kept = strength_F.argsort(descending=True, stable=True)[:needed].sort().values
    return kept.repeat(-(-needed // len(kept)))[:needed]


def gates_sum(pool: GeneralExperts) -> float:
    """What the gates of a token add up to: gate_scale; where they are probabilities, on average while the router is
    fresh, with standard normal logits.
    """
    router = pool.router
    if isinstance(router, Mixer):
        return router.gate_scale
    shape, generator = (DRAWS, len(pool.gain)), torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return float(router.choose(logits, None).gates.sum(-1).mean())


def _places(ours: Sequence[str], theirs: Sequence[str]) -> dict[int, int] | None:
    """Of each class of ours that they have too, where it is in theirs; None where all are the same."""
    if tuple(ours) == tuple(theirs):
        return None
    return {number: theirs.index(name) for number, name in enumerate(ours) if name in theirs}


def _copy(
    model: Head, theirs: Mapping[str, Tensor], upcycled: Mapping[str, Upcycled], places: dict[int, int] | None
) -> list[Part]:
    """By name; the tensors of upcycled pools are done. `places` are where our classes are among theirs, if others."""
    ours = model.state_dict()
    # Whole numbers are of the data: the descriptions of the classes, the words.
    names = [name for name, value in ours.items() if value.is_floating_point()]
    other_words = not torch.equal(*(state.get("output_tokens", torch.empty(0)) for state in (ours, theirs)))
    by_part: dict[str, list[str]] = {}
    for name in names:
        by_part.setdefault(_part_of(name), []).append(name)
    parts = []
    for part, members in by_part.items():
        made = [how for pool, how in upcycled.items() if _part_of(pool) == part]
        left = [name for name in members if not any(name.startswith(f"{pool}.") for pool in upcycled)]
        if part == "output_bias" and other_words:
            parts.append(Part(part, False, "the words that can be written are others"))
            continue
        if part == "head" and places is not None:
            parts.append(_copy_classes({name: (ours[name], theirs.get(name)) for name in left}, places))
            continue
        how_copied = {name: _copy_tensor(name, ours[name], theirs.get(name)) for name in left}
        parts.append(_told(part, how_copied, made))
    return parts


def _copy_classes(pairs: Mapping[str, tuple[Tensor, Tensor | None]], places: Mapping[int, int]) -> Part:
    """Of the head the rows of the classes that both models have."""
    if not places:
        return Part("head", False, "the classes are others")
    for name, (ours, theirs) in pairs.items():
        if theirs is None or theirs.shape[1:] != ours.shape[1:]:
            told = ABSENT if theirs is None else f"is {_shape(ours)} here and {_shape(theirs)} in the file"
            return Part("head", False, f"{name.removeprefix('head.')} {told}")
    count = 0
    for ours, theirs in pairs.values():
        assert theirs is not None
        count = len(ours)
        ours[list(places)] = theirs[list(places.values())]
    return Part("head", True, f"{len(places)} of {count} classes, by name")


def _part_of(name: str) -> str:
    return name.removeprefix("backbone.").split(".")[0]


class _Fate(NamedTuple):
    copied: bool
    how: str
    """Empty where all of it was copied as it is."""


def _copy_tensor(name: str, ours: Tensor, theirs: Tensor | None) -> _Fate:
    """Into `ours`, where it fits."""
    if theirs is None:
        return _Fate(False, ABSENT)
    if ours.shape == theirs.shape:
        ours.copy_(theirs)
        return _Fate(True, "")
    same_width = ours.dim() == theirs.dim() and ours.shape[-1] == theirs.shape[-1]
    if name == "backbone.image_position" and same_width:
        ours.copy_(_interpolated(theirs, ours.shape[1]))
        return _Fate(True, f"{theirs.shape[1]} positions interpolated to {ours.shape[1]}")
    if name == "backbone.text_position" and same_width:
        rows = min(len(ours), len(theirs))
        ours[:rows].copy_(theirs[:rows])
        return _Fate(True, f"{rows} of {len(ours)} rows")
    return _Fate(False, f"is {_shape(ours)} here and {_shape(theirs)} in the file")


def _interpolated(position: Tensor, patches: int) -> Tensor:
    """(1, N, D) of a square grid -> (1, patches, D) of another one; as timm does."""
    before, after = round(position.shape[1] ** 0.5), round(patches**0.5)
    grid = position.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(after, after), mode="bicubic", antialias=True)
    return grid.flatten(2).transpose(1, 2)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "1"


def _told(part: str, fates: Mapping[str, _Fate], upcycled: list[Upcycled]) -> Part:
    copied = [fate for fate in fates.values() if fate.copied]
    why_not = [(name, fate.how) for name, fate in fates.items() if not fate.copied]
    why = ""
    if why_not:
        name, how = why_not[0]
        why = f"{name.removeprefix('backbone.').removeprefix(part).removeprefix('.') or 'it'} {how}"
    if not copied and not upcycled:
        return Part(part, False, "the file has none" if all(how == ABSENT for _, how in why_not) else why)
    told = [f"{len(copied)} of {len(fates)} tensors ({why})"] if why_not else []
    told += [fate.how for fate in copied if fate.how]
    told += [f"{how} (in {count} blocks)" if count > 1 else str(how) for how, count in Counter(upcycled).items()]
    return Part(part, True, "; ".join(told) or "all of it")


def _start_routers(
    model: Head, pools: Mapping[str, GeneralExperts], slices: Mapping[str, int], pictures: Tensor
) -> int:
    """At clusters of the tokens that each pool gets; of how many pools that was done."""
    learned = {name: pool.router for name, pool in pools.items() if isinstance(pool.router, AttentiveRouter)}
    tokens = _tokens(model, {name: pools[name] for name in learned}, pictures)
    started = 0
    for name, router in learned.items():
        experts, group = len(router.keys), slices[name]
        centroids = clusters(tokens[name], -(-experts // group)) if name in tokens else None
        if centroids is not None:
            router.start_at(centroids.repeat_interleave(group, 0)[:experts])
            started += 1
    return started


def _tokens(model: Head, pools: Mapping[str, GeneralExperts], pictures: Tensor) -> dict[str, Tensor]:
    """What the router of each pool looks at, (T, D) normalised, where anything gets there."""
    seen: dict[str, Tensor] = {}

    def looking(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(pool: nn.Module, given: tuple[Any, ...]) -> None:
            assert isinstance(pool, GeneralExperts)
            x, mask = given
            x = F.layer_norm(x, (pool.embed_dim,), eps=pool.eps)
            if isinstance(pool.router, PictureRouter):
                x, mask = mean_token(x, mask), None
            seen[name] = x.flatten(0, -2) if mask is None else x[mask.bool()]

        return look

    handles = [pool.register_forward_pre_hook(looking(name)) for name, pool in pools.items()]
    try:
        with evaluating(model):
            if isinstance(model, Classifier):
                model.answer((pictures,))
            else:  # texts are another matter
                model.backbone.image_features(pictures)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def clusters(tokens: Tensor, count: int) -> Tensor | None:
    """Centroids (count, D) of tokens (T, D), by k-means from k-means++: the same each time.

    None where there are fewer tokens that differ.
    """
    from scipy.cluster.vq import kmeans2  # takes a second

    tokens = tokens[:: -(-len(tokens) // CLUSTERED_TOKENS)]
    if len(tokens.unique(dim=0)) < count:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an empty cluster, whose centroid stays where it was
        found, _ = kmeans2(tokens.double().numpy(), count, iter=20, minit="++", rng=np.random.default_rng(SEED))
    return torch.from_numpy(found).to(tokens.dtype)
