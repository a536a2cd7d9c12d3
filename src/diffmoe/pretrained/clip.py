"""Starting from a trained CLIP: its text embedding and position table, and its dense FFNs upcycled into experts.

Shapes: V rows of CLIP's vocabulary, D width, F hidden width of an FFN, E experts, K experts chosen for a token.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe.config import VOCAB_SIZE, UserError, nearest
from diffmoe.data.hub import REQUEST_SECONDS, in_time
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.heads import Head
from diffmoe.model.layers import ACTIVATIONS, Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.multimodal import MultiModalMoE
from diffmoe.pretrained.parts import Part

PREFIX = "open_clip:"
FORM = (
    "it must be open_clip:<model>/<tag>, such as open_clip:ViT-B-32/laion2b_s34b_b79k, open_clip:<model>/<file>, "
    "a .pt or .safetensors file of CLIP's weights, or a model file of this program, such as digits_model.pth"
)
TEXT_TOWER, IMAGE_TOWER = "transformer.", "visual.transformer."
FFN = ("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
"""CLIP's names for an FFN and the LayerNorm before it, in the order of `_parameters`."""
ALTERED_FFN = ("mlp.ln.weight", "ls_2.gamma")
"""What some models have besides, and an expert has not: a LayerNorm within, a scale after it."""


@dataclass(frozen=True)
class Clip:
    """Weights of a CLIP model."""

    state: dict[str, Tensor]
    """By open_clip's names; the text tower's are without `text.`."""
    quick_gelu: bool = False
    """Trained with x * sigmoid(1.702 x) for gelu; a bare file does not say so."""


@torch.no_grad()
def start_from_clip(model: Head, source: str) -> list[str]:
    """Copy into `model` what fits of a CLIP model; the rest keeps its own start, attention and head among it.

    - `token_embedding` gets CLIP's V rows where text_embed_dim is its width; where embed_dim is too,
      `token_projection` starts as the identity.
    - `text_position` gets CLIP's first rows where embed_dim is its width.
    - Block l of a tower gets the FFN of block l of CLIP's (sparse upcycling, Komatsuzaki et al. 2022, section 3), where
      D and F fit and the activation is gelu: each of the E routed experts is CLIP's `mlp(ln_2(x))`, and the global and
      the modality expert start at zero output (their last Linear is 0, and learns from the first step). The block
      computes y = x + attention(x), then y + mlp(ln_2(y)) for K > 1, whatever the router says, as gates sum to 1;
      y + p * mlp(ln_2(y)) for K = 1, p the probability of the chosen expert. The router is not touched: it breaks the
      tie in training. In a `dense` model the global expert is CLIP's FFN, and the other two are zero.

    This holds without dropout and for layer_norm_eps 1e-5, CLIP's own; a CLIP trained with QuickGELU, as OpenAI's were,
    is met closely, not exactly.

    Args:
        model: changed in place; not at all where this raises.
        source: `open_clip:<model>/<tag>` (downloaded), `open_clip:<model>/<file>`, or a plain path to a state dict.

    Returns:
        A line for each part, copied or skipped, and why.

    Raises:
        UserError: for a malformed source, an unknown model, tag or file, no network, or where nothing fits.
    """
    backbone = model.backbone
    if not isinstance(backbone, MultiModalMoE):  # a baseline's
        raise UserError(f"init is {source!r}: architecture {model.config.architecture!r} has no part that is CLIP's")
    clip = _created(source) if source.startswith(PREFIX) else Clip(_read(source))
    parts = [
        _copy_tokens(backbone, clip.state),
        _copy_positions(backbone, clip.state),
        _upcycle("text_encoder", backbone.text_encoder.blocks, clip, TEXT_TOWER),
        _upcycle("image_encoder", backbone.image_encoder.blocks, clip, IMAGE_TOWER),
    ]
    if not any(part.copied for part in parts):
        takes = _needed(clip.state, backbone.config.activation)
        raise UserError(f"init is {source!r}: nothing of it fits this model: {takes}")
    return [str(part) for part in parts]


def _created(source: str) -> Clip:
    """The weights that `open_clip:<model>/<tag or file>` names, through open_clip, which downloads and converts."""
    name, _, weights = source.removeprefix(PREFIX).partition("/")
    if not name or not weights:
        raise UserError(f"init is {source!r}: {FORM}")
    import open_clip  # takes seconds
    from open_clip.transformer import QuickGELU

    if name not in open_clip.list_models():
        raise UserError(f"init is {source!r}: open_clip has no model {name!r}{nearest(name, open_clip.list_models())}")
    tag = open_clip.get_pretrained_cfg(name, weights)
    if not tag and not Path(weights).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"a file, or one of {', '.join(tags)}" if tags else "a file, as it has no tags"
        raise UserError(f"init is {source!r}: {name} has no tag {weights!r}, nor is that a file: it must be {known}")
    # Downloaded apart: within create_model a failure is also logged, past the caller.
    try:
        path = _downloaded(tag) if tag else weights
    except Exception as error:  # anything from a lost connection to a file that has moved
        hint = f"there must be a network, or {PREFIX}{name}/<file>"
        raise UserError(f"init is {source!r}: cannot download it ({_reason(error)}): {hint}") from error
    try:
        clip = open_clip.create_model(name, pretrained=str(path), force_quick_gelu=bool(tag.get("quick_gelu")))
    except Exception as error:  # a damaged file, one of another model, or a tower that takes another library
        raise UserError(f"init is {source!r}: {path} cannot be read as {name} ({_reason(error)})") from error
    quick_gelu = any(isinstance(module, QuickGELU) for module in clip.modules())
    return Clip(_named(clip.state_dict()), quick_gelu)


def _downloaded(tag: dict[str, Any]) -> str:
    """The file of a tag: from the hub's cache where it is in it, else downloaded, from a hub that answers in time."""
    import open_clip
    from huggingface_hub import HfApi, try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if repository:
        for name in [file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]:
            if isinstance(path := try_to_load_from_cache(repository, name), str):
                return path
        # The download itself tries for a minute before it gives up.
        in_time(lambda: HfApi().model_info(repository, timeout=REQUEST_SECONDS))
    return open_clip.download_pretrained(tag)


def _read(source: str) -> dict[str, Tensor]:
    """The state dict in a file, bare or under `state_dict`, as open_clip's training saves it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source)
    if not path.is_file():
        raise UserError(f"init is {source!r}: there is no such file: {FORM}")
    try:
        if path.suffix == ".safetensors":
            return _named(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"init is {source!r}: it cannot be read, is damaged, or holds more than tensors: {FORM}"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict):
        raise UserError(f"init is {source!r}: the file holds no state dict but a {type(content).__name__}: {FORM}")
    return _named(content)


def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of a plain CLIP: without the wrapper's prefix, or that of an apart text tower."""
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return {name.removeprefix("module.").removeprefix("text."): value for name, value in tensors.items()}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _matrix(state: dict[str, Tensor], name: str) -> Tensor | None:
    value = state.get(name)
    return value if value is not None and value.ndim == 2 else None


def _copy_tokens(backbone: MultiModalMoE, state: dict[str, Tensor]) -> Part:
    name, ours, clip_VD = "token_embedding", backbone.token_embedding.weight, _matrix(state, "token_embedding.weight")
    if clip_VD is None:
        return Part(name, False, "the file has none")
    rows, width = clip_VD.shape
    if rows != VOCAB_SIZE:
        return Part(name, False, f"it has {rows} rows: it must be CLIP's vocabulary, {VOCAB_SIZE}")
    if len(ours) < rows:
        return Part(name, False, f"vocab_size is {len(ours)}: it must be at least {rows}")
    if ours.shape[1] != width:
        return Part(name, False, f"text_embed_dim is {ours.shape[1]}: it must be {width}")
    ours[:rows].copy_(clip_VD)
    if backbone.config.embed_dim != width:
        return Part(name, True, f"{rows} rows")
    nn.init.eye_(backbone.token_projection.weight)
    nn.init.zeros_(backbone.token_projection.bias)
    return Part(name, True, f"{rows} rows; token_projection starts as the identity")


def _copy_positions(backbone: MultiModalMoE, state: dict[str, Tensor]) -> Part:
    name, ours, clip_TD = "text_position", backbone.text_position, _matrix(state, "positional_embedding")
    if clip_TD is None:
        return Part(name, False, "the file has none")
    if ours.shape[1] != clip_TD.shape[1]:
        return Part(name, False, f"embed_dim is {ours.shape[1]}: it must be {clip_TD.shape[1]}")
    rows = min(len(ours), len(clip_TD))
    ours[:rows].copy_(clip_TD[:rows])
    return Part(name, True, f"{rows} of {len(ours)} rows")


def _upcycle(name: str, blocks: Iterable[nn.Module], clip: Clip, tower: str) -> Part:
    """Block l from block l, as many as both towers have."""
    ours = [block for block in blocks if isinstance(block, UnifiedModalEncoder)]
    theirs = _ffns(clip.state, tower)
    if not theirs:
        return Part(name, False, f"the file has no plain FFNs for it ({tower}resblocks with ln_2, c_fc and c_proj)")
    if any(block.global_expert.activation is not ACTIVATIONS["gelu"] for block in ours):
        return Part(name, False, "activation must be gelu, as CLIP's")
    pairs = list(zip(ours, theirs, strict=False))
    if not all(_fits(_host(block), ffn) for block, ffn in pairs):
        (hidden, width), (our_hidden, our_width) = theirs[0][2].shape, ours[0].global_expert.fc1.weight.shape
        return Part(name, False, f"embed_dim {our_width} and hidden {our_hidden}: they must be {width} and {hidden}")
    for block, ffn in pairs:
        _start_as(block, ffn)
    close = " (trained with QuickGELU: close, not equal)" if clip.quick_gelu else ""
    return Part(name, True, f"the FFNs of {len(pairs)} of {len(ours)} blocks{close}")


def _ffns(state: dict[str, Tensor], tower: str) -> list[tuple[Tensor, ...]]:
    """A tower's FFNs in the order of `FFN`, from its first block to the last that is plain."""
    ffns: list[tuple[Tensor, ...]] = []
    while True:
        block = f"{tower}resblocks.{len(ffns)}."
        altered = any(block + name in state for name in ALTERED_FFN)
        if altered or not all(block + name in state for name in FFN) or state[block + FFN[2]].ndim != 2:
            return ffns
        ffns.append(tuple(state[block + name] for name in FFN))


def _host(block: UnifiedModalEncoder) -> Expert | GeneralExperts:
    """What takes CLIP's FFN: the routed pool, and the global expert where a block is dense."""
    pool = block.general_experts
    return pool if isinstance(pool, GeneralExperts) else block.global_expert


def _parameters(host: Expert | GeneralExperts) -> tuple[Tensor, ...]:
    """In the order of `FFN`; those of a pool are stacks of E."""
    if isinstance(host, GeneralExperts):
        return host.weights
    norm, fc1, fc2 = host.norm, host.fc1, host.fc2
    return norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias


def _fits(host: Expert | GeneralExperts, ffn: tuple[Tensor, ...]) -> bool:
    stacked = isinstance(host, GeneralExperts)
    return all(ours.shape[stacked:] == theirs.shape for ours, theirs in zip(_parameters(host), ffn, strict=True))


def _start_as(block: UnifiedModalEncoder, ffn: tuple[Tensor, ...]) -> None:
    """The block's three kinds of experts together become CLIP's FFN."""
    host = _host(block)
    for ours, theirs in zip(_parameters(host), ffn, strict=True):
        ours.copy_(theirs)  # over all E of a stack
    for expert in (block.global_expert, block.modality_expert, block.general_experts):
        if isinstance(expert, Expert) and expert is not host:
            nn.init.zeros_(expert.fc2.weight)
            nn.init.zeros_(expert.fc2.bias)


def _needed(state: dict[str, Tensor], activation: str) -> str:
    """The flags of a model that the file fits, by the widths of its text tower, or else of its image tower."""
    ffns = _ffns(state, TEXT_TOWER) or _ffns(state, IMAGE_TOWER)
    table = _matrix(state, "token_embedding.weight")
    if not ffns:
        if table is None:
            return "it has neither CLIP's token_embedding nor its resblocks"
        return f"it takes --text_embed_dim {table.shape[1]} --vocab_size {VOCAB_SIZE}"
    hidden, width = ffns[0][2].shape
    flags = f"--embed_dim {width} --text_embed_dim {width} --expansion_factor {hidden / width:g}"
    return f"it takes {flags}" + ("" if activation == "gelu" else " --activation gelu")
