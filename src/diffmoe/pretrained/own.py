"""Starting from a model of one's own: by name and shape; and where it is dense and the new one routed, upcycled.

Shapes: D width, E experts, K experts chosen for a token, H hidden width of an expert, F of a dense layer, B pictures,
T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import ModelConfig, UserError
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import Classifier, Head
from diffmoe.model.layers import evaluating
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routers import AttentiveRouter, Mixer
from diffmoe.storage.model_files import MODEL_FORMAT, ModelFile, load_model_file, read

ALIKE = ("activation", "num_heads")
"""Fields without which weights of the same shapes compute something else."""
OF_THE_DATA = ("class_tokens", "class_mask", "output_tokens")
"""Buffers that say what the new model is for."""
EXPERT = ("norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
"""What an expert's parameters are called, in the order of `ExpertWeights`."""
SAMPLE = 512
"""Pictures whose tokens are clustered, at most."""


def model_in(source: str) -> ModelFile | None:
    """The model of this program in a file; None where it is none, or not whole. Raises `UserError` for an unfit one."""
    try:
        read(source, MODEL_FORMAT)
    except UserError:
        return None
    return load_model_file(source)


@torch.no_grad()
def start_from(
    model: Head, source: str, found: ModelFile, class_names: tuple[str, ...] = (), pictures: Tensor | None = None
) -> list[str]:
    """Copy what has the same name and shape, and what can be made to fit.

    - Positions of another grid of patches are interpolated (bicubic, as timm does for its ViTs).
    - A dense layer in the place of a routed pool becomes its experts (`upcycled`), and the image tower's routers start
      from the clusters of the tokens that reach them (`start_from_clusters`).

    The head is copied where the classes, or the words, are the same.

    Args:
        model: changed in place; not at all where this raises.
        source: what the user gave.
        found: the model in it.
        class_names: of the data that `model` is for.
        pictures: (B, C, H, W) float, normalised, of that data; None leaves routers as they are.

    Returns:
        A line for each part of `model`: what was copied, or why it was not.

    Raises:
        UserError: where nothing fits, or what fits would compute something else.
    """
    theirs, config = found.model, model.config
    for name in ALIKE:
        own, other = getattr(config, name), getattr(theirs.config, name)
        if own != other:
            raise UserError(f"init is {source!r}: its {name} is {other!r}, this model's {own!r}: give --{name} {other}")
    new, dense = _by_name(model, theirs, found.data.class_names == class_names), dict(_upcycled(model, theirs))
    if not dense and not any(value.dim() > 1 for value in new.values()):  # a temperature alone is no start
        raise UserError(
            f"init is {source!r}: nothing of it fits this model: it has embed_dim {theirs.config.embed_dim} and "
            f"patch_size {theirs.config.patch_size}, this one {config.embed_dim} and {config.patch_size}"
        )
    for pool in dense.values():
        new |= pool
    state = model.state_dict()
    for name, value in new.items():
        state[name].copy_(value)
    lines = [_line(part, names, new, theirs.state_dict()) for part, names in _parts(state).items()]
    if dense:
        lines.append(f"{len(dense)} dense layers became the experts of as many pools")
        if pictures is not None and (count := start_from_clusters(model, pictures, set(dense))):
            lines.append(f"{count} routers start from the clusters of their tokens")
    return lines


def upcycled(ffn: Mapping[str, Tensor], scale: float, pool: GeneralExperts) -> dict[str, Tensor]:
    """Weights with which a pool computes what a dense layer does (Komatsuzaki et al. 2022, "Sparse upcycling").

    With F about n H each expert is a slice of the layer, expert e the (e mod n)-th; n is from 1 (all are copies) to K.
    What does not come out even: the weakest units (by the lengths of their two rows of weights) are left out, or units
    are added of which nothing comes out yet. The pool's gates must add up to gate_scale: for K = 1, where the gate is a
    probability p, all is p times as loud. It is the layer itself for n = 1 or where a token's experts are the n
    slices; else it is so in the mean.

    Args:
        ffn: by the names of `EXPERT`; fc1.weight (F, D).
        scale: what the layer's output is multiplied by.
        pool: it is not changed.

    Returns:
        By the names of `ExpertWeights`, (E, ...).
    """
    num_experts, hidden, _ = pool.fc1_weight.shape
    units = len(ffn["fc1.weight"])
    at_most = 1 if isinstance(pool.router, Mixer) else min(pool.router.top_k, num_experts)
    slices = max(1, min(round(units / hidden), at_most))
    strength_F = ffn["fc1.weight"].norm(dim=1) * ffn["fc2.weight"].norm(dim=0)
    kept_F = strength_F.topk(min(units, slices * hidden)).indices.sort().values
    rows_F = torch.arange(len(kept_F)) % slices * hidden + torch.arange(len(kept_F)) // slices  # dealt out in turn
    slice_of_E = torch.arange(num_experts) % slices
    gain = scale / pool.router.gate_scale
    stacks = {name: getattr(pool, name).detach().clone() for name in pool.weights._fields}
    fc1, fc1_bias = stacks["fc1_weight"][:slices].flatten(0, 1), stacks["fc1_bias"][:slices].flatten(0, 1)
    fc2 = torch.zeros(slices * hidden, fc1.shape[1], dtype=fc1.dtype)
    fc1[rows_F], fc1_bias[rows_F] = ffn["fc1.weight"][kept_F].to(fc1), ffn["fc1.bias"][kept_F].to(fc1)
    fc2[rows_F] = gain * slices * ffn["fc2.weight"].T[kept_F].to(fc1)
    return {
        "gain": ffn["norm.weight"].expand_as(stacks["gain"]),
        "shift": ffn["norm.bias"].expand_as(stacks["shift"]),
        "fc1_weight": fc1.unflatten(0, (slices, hidden))[slice_of_E],
        "fc1_bias": fc1_bias.unflatten(0, (slices, hidden))[slice_of_E],
        "fc2_weight": fc2.unflatten(0, (slices, hidden)).mT[slice_of_E],
        "fc2_bias": (gain * ffn["fc2.bias"]).expand_as(stacks["fc2_bias"]),
    }


@torch.no_grad()
def start_from_clusters(model: Head, pictures: Tensor, pools: set[str]) -> int:
    """Let the image tower's routers among `pools` send each cluster of their tokens (k-means) to an expert of its own.

    After cluster-aware upcycling (arXiv 2604.13508). Returns how many routers there were: those by attention.
    """
    from sklearn.cluster import KMeans  # takes a second

    image_pools = {name: pool for name, pool in _pools(model) if name in pools and ".image_encoder." in name}
    routers = {name: pool.router for name, pool in image_pools.items() if isinstance(pool.router, AttentiveRouter)}
    tokens_of: dict[str, Tensor] = {}

    def seen(name: str) -> object:
        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].float()
            tokens_of[name] = F.layer_norm(x, x.shape[-1:]).flatten(0, -2)

        return keep

    with evaluating(model), ExitStack() as hooks:
        for name in routers:
            hooks.callback(image_pools[name].register_forward_pre_hook(seen(name)).remove)  # type: ignore[arg-type]
        model.backbone.image_features(pictures[:SAMPLE].to(next(model.parameters())))
    for name, router in routers.items():
        tokens = tokens_of[name].cpu()
        if len(tokens) >= len(router.keys):
            means = KMeans(len(router.keys), random_state=0).fit(tokens.numpy()).cluster_centers_
            router.start_at(torch.from_numpy(means))
    return len(routers)


def _by_name(model: Head, theirs: Head, same_classes: bool) -> dict[str, Tensor]:
    """What of theirs has a name and shape of ours, and positions brought to our grid."""
    state, own = theirs.state_dict(), model.state_dict()
    same_head = type(theirs) is type(model) and (
        same_classes
        if isinstance(model, Classifier)
        else isinstance(theirs, Captioner)
        and isinstance(model, Captioner)
        and torch.equal(theirs.output_tokens, model.output_tokens)
    )
    found: dict[str, Tensor] = {}
    for name, value in own.items():
        if name not in state or name in OF_THE_DATA or not (same_head or name.startswith("backbone.")):
            continue
        if state[name].shape == value.shape:
            found[name] = state[name]
        elif name == "backbone.image_position" and state[name].shape[-1] == value.shape[-1]:
            found[name] = _at_grid(state[name], model.config)
    return found


def _at_grid(position_1ND: Tensor, config: ModelConfig) -> Tensor:
    """Positions of a square grid of patches, as many as the config has: (1, N, D)."""
    before, after = round(position_1ND.shape[1] ** 0.5), round(config.num_patches**0.5)
    grid = position_1ND.unflatten(1, (before, before)).movedim(-1, 1)
    return F.interpolate(grid, (after, after), mode="bicubic", align_corners=False).flatten(2).mT


def _upcycled(model: Head, theirs: Head) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each routed pool of ours where theirs has a dense layer of the same width: its name, and its new weights."""
    state, scale = theirs.state_dict(), theirs.config.dense_scale
    for name, pool in _pools(model):
        ffn = {leaf: state[f"{name}.{leaf}"] for leaf in EXPERT if f"{name}.{leaf}" in state}
        if len(ffn) == len(EXPERT) and ffn["fc1.weight"].shape[1] == pool.embed_dim:
            yield name, {f"{name}.{leaf}": value for leaf, value in upcycled(ffn, scale, pool).items()}


def _pools(model: Head) -> Iterator[tuple[str, GeneralExperts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, GeneralExperts))


def _parts(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the tensors of each part: a tower, an embedding, the head."""
    parts: dict[str, list[str]] = {}
    for name in state:
        if name not in OF_THE_DATA:
            parts.setdefault(name.removeprefix("backbone.").split(".")[0], []).append(name)
    return parts


def _line(part: str, names: list[str], new: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    taken = [name for name in names if name in new]
    if len(taken) == len(names):
        return f"{part}: copied"
    if taken:
        return f"{part}: copied, {len(taken)} of {len(names)} tensors"
    if not any(name in theirs for name in names):
        return f"{part}: skipped, the file has none"
    return f"{part}: skipped, it is of other sizes, classes or words"
