"""Captioned pictures in batches: one caption a picture, drawn anew each epoch, and nothing lost or mixed up."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from tests.data.samples import pairs

from diffmoe.config import END_ID, START_ID
from diffmoe.data.captions import CaptionBatch, CaptionBatches, CaptionSplit, caption_tokens, used_tokens
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.text import detokenize

PICTURE = PictureSpec(4, 1, (0.0,), (1 / 255,))


def grey_split(count: int, captions: int = 3) -> CaptionSplit:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return CaptionSplit(images, tuple(tuple(f"grey {n} number {k}" for k in range(captions)) for n in range(count)))


def batches(split: CaptionSplit, size: int = 4, **options: Any) -> CaptionBatches:
    return CaptionBatches(split, size, max_text_len=16, picture=PICTURE, **options)


def shown(batch: CaptionBatch) -> list[tuple[int, str]]:
    """(grey level, caption) of each picture of a batch."""
    levels = batch.images.amax((1, 2, 3)).round().int().tolist()
    return list(zip(levels, detokenize(batch.tokens), strict=True))


def test_each_picture_comes_once_an_epoch_with_one_of_its_own_captions() -> None:
    for epoch in range(3):
        seen = [pair for batch in batches(grey_split(10), shuffle=True).epoch(epoch) for pair in shown(batch)]
        assert sorted(grey for grey, _ in seen) == list(range(10))
        assert all(text.startswith(f"grey {grey} number") for grey, text in seen)


def test_captions_are_drawn_anew_each_epoch_and_evenly() -> None:
    loader = batches(grey_split(40), 40, shuffle=True, seed=3)
    drawn = [dict(shown(next(iter(loader.epoch(epoch))))) for epoch in range(60)]
    assert drawn[0] != drawn[1]
    counts = Counter(text[-1] for of_epoch in drawn for text in of_epoch.values())
    assert all(700 < counts[str(k)] < 900 for k in range(3))  # 800 each, give or take 4 times sqrt(2400 * 2/9) = 23


def test_any_batch_of_any_epoch_can_be_made_again() -> None:
    loader = batches(grey_split(11), shuffle=True, seed=5)
    whole = list(loader.epoch(2))
    tail = list(batches(grey_split(11), shuffle=True, seed=5).epoch(2, start=1))
    assert len(tail) == len(whole) - 1
    for one, other in zip(whole[1:], tail, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_evaluation_keeps_the_order_and_takes_the_caption_of_the_epochs_number() -> None:
    loader = batches(grey_split(5))
    for epoch in (0, 1, 2, 3):
        seen = [pair for batch in loader.epoch(epoch) for pair in shown(batch)]
        assert seen == [(n, f"grey {n} number {epoch % 3}") for n in range(5)]


def test_ranks_share_a_batch_and_agree_on_its_captions() -> None:
    split = grey_split(12)
    whole = [sorted(shown(batch)) for batch in batches(split, shuffle=True).epoch(1)]
    ranks = [list(batches(split, shuffle=True, rank=r, world_size=2).epoch(1)) for r in range(2)]
    assert [sorted(shown(a) + shown(b)) for a, b in zip(*ranks, strict=True)] == whole


def test_a_batch_is_as_wide_as_its_longest_caption() -> None:
    split = CaptionSplit(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), (("a dog",), ("a dog runs on the grass",)))
    first, second = batches(split, 1).epoch()
    assert first.tokens.shape[1] == 4  # start, a, dog, end
    assert second.tokens.shape[1] == 8
    assert first.mask.all()
    assert second.mask.all()


def test_long_captions_are_cut_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    split = CaptionSplit(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), (("word " * 50,), ("short",), ("word " * 14,)))
    with caplog.at_level(logging.WARNING):
        loader = batches(split, 3, shuffle=True)
        batches(split, 3)  # evaluation says nothing
    assert [record.message for record in caplog.records] == [
        "2 of 3 training captions have 16 tokens or more and are cut there; a larger --max_text_len keeps more"
    ]
    batch = next(iter(loader.epoch()))
    assert batch.tokens.shape[1] == 16
    assert (batch.tokens == END_ID).sum(1).tolist() == [1, 1, 1]


def test_all_captions_know_their_picture_and_what_tokens_are_used() -> None:
    split = CaptionSplit(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), (("a dog", "a cat"), ("a dog runs",)))
    tokens, mask, image_of_text = caption_tokens(split, 16)
    assert detokenize(tokens) == ["a dog", "a cat", "a dog runs"]
    assert mask.sum(1).tolist() == [4, 4, 5]
    assert image_of_text.tolist() == [0, 0, 1]
    used = used_tokens(tokens, mask)
    assert used.tolist() == sorted(set(tokens[mask.bool()].tolist()) - {START_ID})
    assert END_ID in used


def test_a_subset_keeps_each_picture_with_its_captions() -> None:
    split = CaptionSplit(grey_split(5).images, grey_split(5).captions, torch.tensor([True, False, True, False, False]))
    part = split.subset(torch.tensor([3, 0]))
    assert pairs(part) == {n: tuple(f"grey {n} number {k}" for k in range(3)) for n in (3, 0)}
    assert part.held_out is not None
    assert part.held_out.tolist() == [False, True]
    assert part.texts == tuple(f"grey {n} number {k}" for n in (3, 0) for k in range(3))


def test_a_split_of_other_lengths_is_a_bug() -> None:
    with pytest.raises(ValueError, match="3 pictures but 2 captions"):
        CaptionSplit(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), (("a",), ("b",)))
