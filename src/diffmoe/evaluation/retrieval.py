"""How well texts find pictures and pictures texts, over a full gallery.

Shapes: I pictures, M texts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.model.layers import full_precision

RECALL_AT = (1, 5, 10)


def retrieval_metrics(image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank, both ways, by cosine similarity.

    A picture has found its text when the best of its own texts is among the first k; a text has found its picture
    when that is. Among equals the right one comes last, so that a model that says the same of everything finds
    nothing.

    Args:
        image_embeddings: (I, D).
        text_embeddings: (M, D).
        image_of_text: (M,) int64, the picture of each text; each picture has at least one.

    Returns:
        i2t_r1, i2t_r5, i2t_r10, t2i_r1, t2i_r5, t2i_r10 from 0 to 1; i2t_median_rank, t2i_median_rank from 1.
    """
    images, texts = F.normalize(image_embeddings.float(), dim=-1), F.normalize(text_embeddings.float(), dim=-1)
    with full_precision(images):  # in bfloat16 whole galleries are equally similar, and equals count as misses
        similarity_IM = images @ texts.T
    own_IM = image_of_text == torch.arange(len(images), device=image_of_text.device)[:, None]
    if not own_IM.any(1).all():
        raise ValueError(f"picture {int((~own_IM.any(1)).nonzero()[0])} has no text")
    metrics: dict[str, float] = {}
    for name, found in (("i2t", ranks(similarity_IM, own_IM)), ("t2i", ranks(similarity_IM.T, own_IM.T))):
        metrics |= {f"{name}_r{k}": (found <= k).float().mean().item() for k in RECALL_AT}
        metrics[f"{name}_median_rank"] = found.float().median().item()
    return metrics


def ranks(similarity: Tensor, right: Tensor) -> Tensor:
    """For each query the rank of its best right answer, from 1: (Q, G) float and (Q, G) bool -> (Q,) int64.

    Every wrong answer that is as similar counts as better.
    """
    best = similarity.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    return 1 + ((similarity >= best) & ~right).sum(1)
