"""What one step is given, as far as its FLOPs depend on it: read off a step that was run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffmoe.model.captioner import ROWS_MULTIPLE, Captioner
from diffmoe.model.dispatch import choose_backend, few_rows
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts, Routing
from diffmoe.model.sorted_rows import ExpertWeights, row_multiple


@dataclass(frozen=True)
class Work:
    """One step on a batch."""

    task: str
    """classifier or captioner."""
    pictures: int
    """B."""
    training: bool
    """Forward and backward, with the losses that need labels or paired texts; else forward alone."""
    texts: int = 0
    """U that go through the text tower."""
    text_len: int = 0
    """T, padding included."""
    real_text_tokens: int = 0
    """Of the U * T: only these are routed."""
    masked_tokens: int = 0
    """Text tokens that the routers' losses average over, padding included: also those of descriptions read before."""
    classes: int = 0
    """A classifier's descriptions, from which it reads the class; 0 without any."""
    vocabulary: int = 0
    """V, a captioner's."""
    vocabulary_rows: int = 0
    """Tokens that are compared with the vocabulary."""
    padding_rows: Mapping[str, int] = field(default_factory=dict)
    """By place, rows of padding in the experts' products, all blocks together."""
    backends: Mapping[str, str] = field(default_factory=dict)
    """By place, how tokens get to their experts: a name of `dispatch.BACKENDS`."""
    fused_attention: bool = False
    """Torch's fused kernel, which keeps no scores."""


def observe(
    model: ImageClassifier | Captioner, batch: Sequence[Tensor], out: Mapping[str, Any], training: bool
) -> Work:
    """The work of a step on `batch`, of which the model returned `out`.

    `batch` is (images, labels), or (images, tokens, mask). When not `training`, a classifier read its descriptions
    before.
    """
    texts = out["text_features"]
    count, length = (0, 0) if texts is None else texts.shape[:2]
    masks = [routing.mask for routing in out["routing"] if routing.place == "text"]
    kernel = model.config.attention
    backends, padding_rows = _pools(model, out["routing"])
    shared: dict[str, Any] = {
        "pictures": len(batch[0]),
        "training": training,
        "masked_tokens": count * length,
        "backends": backends,
        "padding_rows": padding_rows,
        "fused_attention": kernel == "fused" or (kernel == "auto" and batch[0].device.type != "cpu"),
    }
    real = int(masks[0].sum()) if masks else 0
    if isinstance(model, Captioner):
        rows = _target_rows(model, *batch[1:]) if training else count * length
        vocabulary = {"vocabulary": len(model.output_tokens), "vocabulary_rows": rows}
        return Work("captioner", texts=count, text_len=length, real_text_tokens=real, **shared, **vocabulary)
    classes = 0 if model.class_tokens is None else len(model.class_tokens)
    if training:
        shared |= {"texts": count, "text_len": length, "real_text_tokens": real}
    else:
        padding_rows.pop("text", None)
    return Work("classifier", classes=classes, **shared)


def _target_rows(model: Captioner, tokens: Tensor, mask: Tensor) -> int:
    """Rows of the product with the vocabulary in `caption_loss`: targets that can be written, filled up."""
    targets = tokens[:, 1:][mask[:, 1:].bool()]
    count = int(torch.isin(targets, model.output_tokens).sum())
    return -(-count // ROWS_MULTIPLE) * ROWS_MULTIPLE


def _pools(model: torch.nn.Module, routings: Sequence[Routing]) -> tuple[dict[str, str], dict[str, int]]:
    """By place: the backend that ran, and the rows of padding in its experts' products."""
    blocks = [block for block in model.modules() if isinstance(block, UnifiedModalEncoder)]
    pools = {block.place: block.general_experts for block in blocks}
    backends: dict[str, str] = {}
    padding: dict[str, int] = defaultdict(int)
    for routing in routings:
        pool = pools[routing.place]
        assert isinstance(pool, GeneralExperts)
        backends[routing.place] = _backend(pool, routing)
        padding[routing.place] += _padding_rows(routing, backends[routing.place])
    return backends, padding


def _backend(pool: GeneralExperts, routing: Routing) -> str:
    if pool.backend != "auto":
        return pool.backend
    device = pool.gain.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else pool.gain.dtype
    stacks = (pool.gain, pool.shift, pool.fc1_weight, pool.fc1_bias, pool.fc2_weight, pool.fc2_bias)
    like = torch.empty(0, pool.embed_dim, device=device, dtype=dtype)
    return choose_backend(like, routing.expert_ids.numel(), ExpertWeights(*stacks))


def _padding_rows(routing: Routing, backend: str) -> int:
    """Rows in the experts' products that are no routed slot."""
    slots, counts = routing.expert_ids.numel(), routing.tokens_per_expert
    routed = int(counts.sum())
    if backend == "grouped":
        return slots - routed  # padding tokens go along
    if backend == "masked":
        return len(counts) * (slots // routing.expert_ids.shape[-1]) - routed
    if backend == "padded":
        return sum(few_rows(counts.tolist())) - routed
    multiple = row_multiple(slots, len(counts))
    return int((-(-counts // multiple) * multiple).sum()) - routed
