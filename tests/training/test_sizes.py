"""How large pictures are, and when; and that a run's first half has the smaller ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from diffmoe.config import ModelConfig, TrainingConfig
from diffmoe.model.patch_embed import PatchEmbed
from diffmoe.training.sizes import picture_size, resized


@pytest.mark.parametrize(
    ("start", "img_size", "patch_size", "size"),
    [
        (0.5, 32, 4, 16),
        (0.75, 32, 4, 24),
        (0.7, 32, 4, 24),  # 5.6 patches
        (0.6, 28, 7, 14),  # 2.4 patches
        (0.01, 32, 4, 4),  # a whole one at least
    ],
)
def test_of_the_first_half_is_a_share_in_whole_patches(start: float, img_size: int, patch_size: int, size: int) -> None:
    config, model = TrainingConfig(start_size=start), ModelConfig(img_size=img_size, patch_size=patch_size)
    assert [picture_size(step, 6, config, model) for step in range(6)] == [size] * 3 + [None] * 3
    assert [picture_size(step, 5, config, model) for step in range(5)] == [size] * 3 + [None] * 2


def test_without_start_size_pictures_stay() -> None:
    assert picture_size(0, 10, TrainingConfig(), ModelConfig()) is None
    batch = (torch.randn(2, 1, 8, 8), torch.tensor([1, 2]))
    assert resized(batch, None) is batch


def test_resizing_averages_and_leaves_the_rest_of_the_batch() -> None:
    images, labels, share = torch.randn(3, 2, 8, 8), torch.tensor([1, 2, 0]), torch.rand(3)
    small, *others = resized((images, labels, share), 4)
    assert others == [labels, share]
    assert small.shape == (3, 2, 4, 4)
    torch.testing.assert_close(small, F.interpolate(images, (4, 4), mode="bilinear", antialias=True))
    torch.testing.assert_close(small.mean((2, 3)), images.mean((2, 3)), atol=0.3, rtol=0)
    torch.testing.assert_close(resized((torch.full((1, 1, 8, 8), 2.5),), 6)[0], torch.full((1, 1, 6, 6), 2.5))


def test_a_run_begins_with_smaller_pictures(
    cli: Any, tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = PatchEmbed.forward

    def look(self: PatchEmbed, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen.append(images.shape[-1])
        return forward(self, images)

    monkeypatch.setattr(PatchEmbed, "forward", look)
    flags = [*tiny_flags, "--epochs", 2, "--start_size", 0.5, "--batch_size", 64, "--save_dir", tmp_path]
    assert cli("train", *flags).code == 0
    assert seen == [4] * 5 + [8] * 5
