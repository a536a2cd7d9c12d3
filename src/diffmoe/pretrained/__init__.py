"""What a new model may start from instead of from nothing: a model of one's own, or a trained CLIP."""

from __future__ import annotations

from torch import Tensor

from diffmoe.model.heads import Head
from diffmoe.pretrained import clip, own

__all__ = ["start_from"]


def start_from(
    model: Head, source: str, class_names: tuple[str, ...] = (), pictures: Tensor | None = None
) -> list[str]:
    """Copy into `model` what fits of another one; the rest keeps its own start.

    Args:
        model: changed in place; not at all where this raises.
        source: a model file of this program (`own.start_from`), or what `clip.start_from` takes.
        class_names: of the data that `model` is for.
        pictures: (B, C, H, W) float, normalised, of that data: routers start from the clusters of their tokens.

    Returns:
        A line for each part: what was copied, or why it was not.

    Raises:
        UserError: where the source cannot be read, or nothing of it fits.
    """
    found = own.model_in(source)
    return (
        clip.start_from(model, source) if found is None else own.start_from(model, source, found, class_names, pictures)
    )
