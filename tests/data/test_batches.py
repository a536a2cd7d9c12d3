"""The order and the augmentation of batches are functions of (seed, epoch, batch, rank), and lose no picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffmoe.config import DataConfig, UserError
from diffmoe.data.batches import Batch, Batches
from diffmoe.data.folders import FilePictures
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.splits import Split

PICTURE = PictureSpec(8, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
AUGMENT = DataConfig(crop_padding=2, flip=True, erase=0.5)


def numbered(count: int, size: int = 8) -> Split:
    """Random pictures; the label of each is its number."""
    generator = torch.Generator().manual_seed(count)
    return Split(
        torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator), torch.arange(count)
    )


def batches(split: Split, batch_size: int, **options: Any) -> Batches:
    return Batches(split, batch_size, picture=PICTURE, **options)


def labels_of(epoch: list[Batch]) -> list[int]:
    return torch.cat([batch.labels for batch in epoch]).tolist()


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


@given(count=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_an_epoch_is_a_permutation_with_every_picture_at_its_label(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    split = numbered(count, size=2)
    loader = batches(split, batch_size, shuffle=True, seed=seed)
    found = list(loader.epoch(epoch))
    assert len(found) == len(loader) == -(-count // batch_size)
    assert sorted(labels_of(found)) == list(range(count))
    for images, labels in found:
        assert torch.equal(images, PICTURE.normalize(split.images[labels]))


def test_order_follows_seed_and_epoch() -> None:
    orders = [
        labels_of(list(batches(numbered(40), 7, shuffle=True, seed=seed).epoch(epoch)))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert orders[0] == orders[3]
    assert len(set(map(tuple, orders))) == 3


def test_evaluation_is_in_order_and_never_augmented() -> None:
    split = numbered(23)
    loader = batches(split, 5)
    for epoch in range(2):
        found = list(loader.epoch(epoch))
        assert labels_of(found) == list(range(23))
        images = torch.cat([batch.images for batch in found])
        assert torch.equal(images, PICTURE.normalize(split.images[:]))


@given(start=st.integers(0, 8), epoch=st.integers(0, 2))
def test_resuming_in_mid_epoch_is_bit_equal(start: int, epoch: int) -> None:
    loader = batches(numbered(30), 4, shuffle=True, seed=3, augment=AUGMENT)
    assert equal(list(loader.epoch(epoch))[start:], list(loader.epoch(epoch, start)))


def test_batches_leave_the_global_generator_alone() -> None:
    loader = batches(numbered(30), 4, shuffle=True, augment=AUGMENT)
    torch.manual_seed(1)
    first = list(loader.epoch())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert equal(first, list(loader.epoch()))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@given(count=st.integers(1, 40), share=st.integers(1, 6), world_size=st.integers(1, 5), epoch=st.integers(0, 2))
def test_ranks_together_train_on_what_one_would(count: int, share: int, world_size: int, epoch: int) -> None:
    split, batch_size = numbered(count, size=2), share * world_size
    alone = [batch.labels.tolist() for batch in batches(split, batch_size, shuffle=True).epoch(epoch)]
    ranks = [
        [
            batch.labels.tolist()
            for batch in batches(split, batch_size, shuffle=True, rank=rank, world_size=world_size).epoch(epoch)
        ]
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for number, batch in enumerate(alone):
        shares = [rank[number] for rank in ranks]
        assert {len(part) for part in shares} == {-(-len(batch) // world_size)}  # none empty, all equal
        together = [label for part in zip(*shares, strict=True) for label in part]
        assert together[: len(batch)] == batch  # what follows fills up the last batch
        assert len(together) - len(batch) < world_size


@given(count=st.integers(1, 40), batch_size=st.integers(1, 20), world_size=st.integers(1, 5))
def test_ranks_together_evaluate_every_picture_once(count: int, batch_size: int, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        loader = batches(numbered(count, size=2), batch_size, rank=rank, world_size=world_size)
        found = list(loader.epoch())
        assert len(found) == len(loader)
        seen += [label for batch in found for label in batch.labels.tolist()]
    assert sorted(seen) == list(range(count))


def test_ranks_draw_their_own_augmentation() -> None:
    same = Split(numbered(1).images[torch.zeros(8, dtype=torch.int64)], torch.arange(8))
    first, second = (
        next(batches(same, 8, shuffle=True, augment=AUGMENT, rank=rank, world_size=2).epoch()).images for rank in (0, 1)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_batches_equal_those_in_memory(tmp_path: Path, num_workers: int) -> None:
    split = numbered(14)
    for number, picture in enumerate(split.images[:].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / f"{number}.png")
    lazy = LazyImages.of(FilePictures(tmp_path, tuple(f"{number}.png" for number in range(14))), PICTURE)
    options: dict[str, Any] = {"shuffle": True, "augment": AUGMENT}
    streamed = batches(Split(lazy, split.labels), 4, num_workers=num_workers, **options)
    assert equal(list(streamed.epoch(1, 1)), list(batches(split, 4, **options).epoch(1, 1)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_devices_see_the_same_pictures() -> None:
    options: dict[str, Any] = {"shuffle": True, "augment": AUGMENT}
    on_cpu, on_gpu = (list(batches(numbered(30), 8, device=device, **options).epoch()) for device in ("cpu", "cuda"))
    for here, there in zip(on_cpu, on_gpu, strict=True):
        assert there.images.device.type == there.labels.device.type == "cuda"
        assert torch.equal(here.labels, there.labels.cpu())
        torch.testing.assert_close(here.images, there.images.cpu())


def test_what_cannot_be_shared_or_cropped_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size is 7: it must be a multiple of the 2 devices"):
        batches(numbered(9), 7, shuffle=True, world_size=2)
    with pytest.raises(UserError, match="crop_padding is 8: it must be less than the pictures' 8 pixels"):
        batches(numbered(9), 7, augment=DataConfig(crop_padding=8))
