"""Retrieval over a full gallery equals a loop that looks at one query after the other; equals flatter nobody."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluation.models import captioner
from torch import Tensor
from torch.nn import functional as F

from diffmoe.evaluation.passes import run_over
from diffmoe.evaluation.retrieval import ranks, retrieval_metrics
from diffmoe.model.outputs import CaptionerOutput


def by_loop(images: torch.Tensor, texts: torch.Tensor, image_of_text: list[int]) -> dict[str, float]:
    """One query after the other: sort the gallery, wrong ones first among equals, and look for the right answer."""
    cosine = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).tolist()
    image_ranks, text_ranks = [], []
    for i in range(len(images)):
        order = sorted(range(len(texts)), key=lambda m, i=i: (-cosine[i][m], image_of_text[m] == i))
        image_ranks.append(1 + next(place for place, m in enumerate(order) if image_of_text[m] == i))
    for m in range(len(texts)):
        order = sorted(range(len(images)), key=lambda i, m=m: (-cosine[i][m], image_of_text[m] == i))
        text_ranks.append(1 + order.index(image_of_text[m]))
    found = {}
    for name, of_query in (("i2t", image_ranks), ("t2i", text_ranks)):
        found |= {f"{name}_r{k}": sum(rank <= k for rank in of_query) / len(of_query) for k in (1, 5, 10)}
        found[f"{name}_median_rank"] = float(statistics.median_low(of_query))
    return found


@settings(deadline=None, max_examples=50)
@given(num_images=st.integers(1, 12), more=st.integers(0, 20), seed=st.integers(0, 10**6), coarse=st.booleans())
def test_equals_a_loop(num_images: int, more: int, seed: int, coarse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    image_of_text = torch.cat([torch.arange(num_images), torch.randint(num_images, (more,), generator=generator)])
    image_of_text = image_of_text[torch.randperm(len(image_of_text), generator=generator)]
    images, texts = (torch.randn(n, 4, generator=generator) for n in (num_images, len(image_of_text)))
    if coarse:  # many equal similarities, exactly so
        images, texts = images[:, :1].sign(), texts[:, :1].sign()
    assert retrieval_metrics(images, texts, image_of_text) == pytest.approx(
        by_loop(images, texts, image_of_text.tolist())
    )


def test_by_hand() -> None:
    # Texts 0, 1 are picture 0's, text 2 picture 1's. Picture 0 finds text 1 first; picture 1 finds text 0, then 2.
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[0.8, 0.6], [1.0, -0.1], [0.0, 1.0]])
    found = retrieval_metrics(images, texts, torch.tensor([0, 0, 1]))
    assert (found["i2t_r1"], found["i2t_r5"], found["i2t_median_rank"]) == (0.5, 1.0, 1.0)
    # Text 0 is nearer to picture 1 (0.96) than to its own (0.8); the two others find theirs.
    assert found["t2i_r1"] == pytest.approx(2 / 3)


def test_a_model_that_says_the_same_of_everything_finds_nothing() -> None:
    found = retrieval_metrics(torch.ones(20, 3), torch.ones(100, 3), torch.arange(100) // 5)
    assert (found["i2t_r10"], found["t2i_r10"], found["t2i_median_rank"]) == (0, 0, 20)


def test_scale_and_order_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(9, 5, generator=generator), torch.randn(27, 5, generator=generator)
    owner = torch.arange(27) % 9
    order = torch.randperm(27, generator=generator)
    found = retrieval_metrics(images, texts, owner)
    assert retrieval_metrics(3 * images, texts[order] / 7, owner[order]) == found
    assert found["t2i_r10"] == 1  # k over the gallery


class Embeddings:
    """Keeps those of pictures and texts."""

    def __init__(self) -> None:
        self.images, self.texts = list[Tensor](), list[Tensor]()

    def add(self, batch: Sequence[Tensor], output: CaptionerOutput) -> None:
        assert output.text is not None
        self.images.append(output.image.embedding)
        self.texts.append(output.text.embedding)


def test_bfloat16_makes_no_ties_that_count_as_misses() -> None:
    """200 pictures that differ little, of a model that runs in bfloat16: each is nearest to itself, as in float32."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(1, 1, 8, 8, generator=generator) + 0.1 * torch.randn(200, 1, 8, 8, generator=generator)
    tokens = torch.randint(1, 60, (200, 6), generator=generator)
    found = Embeddings()
    batches = zip(images.split(50), tokens.split(50), torch.ones_like(tokens).split(50), strict=True)
    run_over(captioner(), batches, found.add, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    own = torch.arange(200)
    for embedding in (torch.cat(found.images), torch.cat(found.texts)):
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(200), atol=1e-6, rtol=0)
        metrics = retrieval_metrics(embedding, embedding, own)
        assert (metrics["i2t_r1"], metrics["t2i_median_rank"]) == (1, 1)
        with torch.autocast("cpu", torch.bfloat16):  # wherever it is called
            assert retrieval_metrics(embedding, embedding, own) == metrics
    rounded = torch.cat(found.images).bfloat16()
    missed = ranks((rounded @ rounded.T).float(), torch.eye(200).bool()) > 1
    assert missed.float().mean() > 0.5  # or nothing was tested


def test_a_picture_without_a_text_is_named() -> None:
    with pytest.raises(ValueError, match="picture 1 has no text"):
        retrieval_metrics(torch.ones(3, 2), torch.ones(2, 2), torch.tensor([0, 2]))


def test_ranks_are_of_the_best_right_answer() -> None:
    similarity = torch.tensor([[0.9, 0.5, 0.7, 0.1]])
    assert ranks(similarity, torch.tensor([[False, True, True, False]])).tolist() == [2]
