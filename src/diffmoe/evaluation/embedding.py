"""The embeddings of many pictures, and a plane to look at them in.

Shapes: N pictures, B pictures of one batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffmoe.evaluation.passes import Kept, finite_or_told, run_over
from diffmoe.model.heads import Head
from diffmoe.model.outputs import TextFeatures

MOST_POINTS = 2000
"""`project` takes seconds for so many, and its time grows faster than their number."""
PERPLEXITY = 30
"""t-SNE's effective number of neighbours."""
FEWEST_FOR_TSNE = 8
"""Of fewer points no neighbours can be kept together: PCA alone."""
COMPONENTS = 50
"""Of the PCA before t-SNE, as in van der Maaten and Hinton 2008, section 4.1."""


def embed(
    model: Head, batches: Iterable[Sequence[Tensor]], classes: TextFeatures | None = None
) -> tuple[Tensor, Tensor]:
    """The embeddings that the model classifies, float32 (N, D), and the labels, int64 (N,), on the CPU.

    Raises `ValueError` where there are no batches, `UserError` where an embedding is not finite.
    """
    kept = Kept(lambda batch, output: (output.embedding.float(), batch[1]))
    run_over(model, batches, kept.add, classes=classes)
    embeddings, labels = kept.tensors()
    with finite_or_told():
        if not embeddings.isfinite().all():
            raise FloatingPointError
    return embeddings, labels


def sample(count: int, seed: int, most: int = MOST_POINTS) -> Tensor:
    """Which of `count` pictures to project: (min(count, most),) int64, rising; the same for the same `seed`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def project(embeddings: Tensor, seed: int) -> Tensor:
    """Embeddings (N, D) in a plane, neighbours kept together: float32 (N, 2).

    PCA to 50 dimensions, then t-SNE (van der Maaten and Hinton 2008) from the first two, with perplexity 30, less where
    there are few points; with fewer than 8 points PCA alone. The same embeddings and `seed` give the same points.

    Raises `ValueError` for more than `MOST_POINTS`: `sample` them.
    """
    # Imported here because it takes seconds, which those who draw no such picture need not pay.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = len(embeddings)
    if not 0 < count <= MOST_POINTS:
        raise ValueError(f"there are {count} embeddings to project: it must be 1 to {MOST_POINTS}")
    values = embeddings.float().numpy()
    if not (values != values[0]).any():
        return torch.zeros(count, 2)
    reduced = PCA(min(COMPONENTS, *values.shape), svd_solver="full").fit_transform(values)
    if count < FEWEST_FOR_TSNE:
        return torch.from_numpy(reduced[:, :2]).float()
    # One thread: the order of its sums, and so the picture, would depend on the number of cores.
    tsne = TSNE(perplexity=min(PERPLEXITY, (count - 1) / 3), init="pca", max_iter=500, random_state=seed, n_jobs=1)
    return torch.from_numpy(tsne.fit_transform(reduced)).float()
