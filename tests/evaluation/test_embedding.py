"""Embeddings do not depend on batches, and the plane keeps neighbours together, the same ones each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.models import StubHead, answer, number
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.evaluation.embedding import FEWEST_FOR_TSNE, MOST_POINTS, embed, project, sample
from diffmoe.model.outputs import ClassifierOutput, TextFeatures


class Doubled(StubHead):
    """Embeds a picture as twice its pixels, while it is not training."""

    def run(self, batch: Sequence[Tensor], *, classes: TextFeatures | None = None, **options: Any) -> ClassifierOutput:
        shift = 0.0 if classes is None else classes.embedding
        embedding = batch[0].flatten(1) * (math.nan if self.training else 2) + shift
        return answer(embedding, embedding)


def clusters(count: int, per_cluster: int, width: int, spread: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count).repeat(per_cluster)
    centers = torch.randn(count, width, generator=generator)
    return centers[labels] + spread * torch.randn(len(labels), width, generator=generator), labels


class TestEmbed:
    @pytest.mark.parametrize("batch_size", [1, 3, 7])
    def test_every_picture_in_its_order(self, batch_size: int) -> None:
        images, labels = torch.randn(7, 1, 2, 2), torch.arange(7)
        model = Doubled().train()
        batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
        embeddings, found = embed(model, batches, classes=number(1.0))
        assert torch.equal(embeddings, images.flatten(1) * 2 + 1)
        assert torch.equal(found, labels)
        assert model.training
        embeddings += 1  # an ordinary tensor

    def test_no_pictures(self) -> None:
        with pytest.raises(ValueError, match="no pictures"):
            embed(Doubled(), [])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_model_that_diverged(self, value: float) -> None:
        with pytest.raises(UserError, match="not finite"):
            embed(Doubled(), [(torch.full((1, 1, 2, 2), value), torch.tensor([0]))])


@given(count=st.integers(0, 60), most=st.integers(1, 60), seed=st.integers(0, 5))
def test_a_sample_is_of_different_pictures_in_their_order(count: int, most: int, seed: int) -> None:
    chosen = sample(count, seed, most)
    assert len(chosen) == min(count, most)
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    assert all(0 <= row < count for row in chosen.tolist())
    assert torch.equal(chosen, sample(count, seed, most))


def test_a_sample_depends_on_its_seed() -> None:
    assert not torch.equal(sample(1000, 0, 50), sample(1000, 1, 50))


class TestProject:
    def test_neighbours_stay_together(self) -> None:
        embeddings, labels = clusters(6, 20, 40)
        points = project(embeddings, 0)
        assert points.shape == (120, 2)
        distances = torch.cdist(points, points).fill_diagonal_(math.inf)
        assert (labels[distances.argmin(1)] == labels).all()

    def test_the_same_each_time(self) -> None:
        embeddings = torch.randn(100, 60, generator=torch.Generator().manual_seed(0))
        assert torch.equal(project(embeddings, 0), project(embeddings, 0))

    def test_few_points_keep_their_distances(self) -> None:
        """PCA alone: in a plane already, it only turns."""
        embeddings = torch.randn(FEWEST_FOR_TSNE - 1, 2, generator=torch.Generator().manual_seed(0))
        points = project(embeddings, 0)
        torch.testing.assert_close(torch.cdist(points, points), torch.cdist(embeddings, embeddings))
        assert points[:, 0].var() > points[:, 1].var()

    @pytest.mark.parametrize("count", [2, 3, 8, 9])
    def test_few_points_are_told_apart(self, count: int) -> None:
        points = project(clusters(count, 1, 16)[0], 0)
        assert points.shape == (count, 2)
        assert points.dtype == torch.float32
        assert (torch.pdist(points) > 1e-3).all()

    @pytest.mark.parametrize("count", [1, 5, 30])
    def test_equal_embeddings_are_one_point(self, count: int) -> None:
        assert torch.equal(project(torch.full((count, 16), 0.1), 0), torch.zeros(count, 2))

    @pytest.mark.parametrize("count", [0, MOST_POINTS + 1])
    def test_too_many_and_none(self, count: int) -> None:
        with pytest.raises(ValueError, match=f"{count} embeddings"):
            project(torch.zeros(count, 2), 0)
