"""Starting from a trained model: from a CLIP, or from a model of our own, whose dense FFNs can become experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffmoe.model.heads import Head
from diffmoe.pretrained.clip import start_from_clip
from diffmoe.pretrained.own import start_from_own
from diffmoe.storage.model_files import is_own_file

__all__ = ["start_from"]


def start_from(model: Head, source: str, pictures: Tensor | None = None, class_names: Sequence[str] = ()) -> list[str]:
    """Copy into `model` what fits of another one; the rest keeps its own start.

    Args:
        model: changed in place; not at all where this raises.
        source: a model file of ours (`start_from_own`), or what says where a CLIP is (`start_from_clip`).
        pictures: (B, C, H, W) float, normalised, of the training set; with a file of ours routers start from them.
        class_names: of the model's classes, where it has any: with a file of ours those of the same name are copied.

    Returns:
        A line for each part, copied or skipped, and why.

    Raises:
        UserError: for a malformed source, one that is missing or damaged, or where nothing fits.
    """
    if is_own_file(source):
        return start_from_own(model, source, pictures, class_names)
    return start_from_clip(model, source)
