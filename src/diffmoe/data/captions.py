"""Pictures with captions: a split of them, its batches (one caption a picture, drawn anew each epoch), its tokens.

Shapes: N pictures, B pictures of a batch, M captions in all, T text tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe.config import END_ID, START_ID, UserError
from diffmoe.data.batches import PictureBatches, seeded_generator
from diffmoe.data.splits import PictureSplit
from diffmoe.data.text import tokenize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionSplit(PictureSplit):
    """Pictures with captions."""

    captions: tuple[tuple[str, ...], ...]
    """For each picture its captions, at least one."""
    held_out: Tensor | None = None
    """(N,) bool, pictures whose combination of properties is in no training picture; None where nobody knows."""

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for texts in self.captions for text in texts)

    def groups(self, class_names: Sequence[str]) -> dict[str, Tensor]:
        return {"": torch.ones(len(self), dtype=torch.bool)}

    def digest(self) -> bytes:
        return json.dumps(self.captions).encode()


def caption_tokens(split: CaptionSplit, max_text_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """All M captions of a split, picture by picture; those over `max_text_len` are cut.

    Tokens int64 (M, T), their mask (1 at real tokens), and the picture of each caption, int64 (M,).
    """
    tokens, mask = tokenize(split.texts, max_text_len)
    counts = torch.tensor([len(texts) for texts in split.captions])
    return tokens, mask, torch.arange(len(split)).repeat_interleave(counts)


def used_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    """The ids in captions (M, T), sorted int64 (V,), the end token among them: what a model can learn to write."""
    used = tokens[mask.bool()].unique()
    return used[used != START_ID]


class CaptionBatch(NamedTuple):
    """Pictures, and one caption of each."""

    images: Tensor
    """float32 (B, C, H, W), normalised."""
    tokens: Tensor
    """int64 (B, T)."""
    mask: Tensor
    """int64 (B, T), 1 at real tokens."""


class CaptionBatches(PictureBatches[CaptionSplit]):
    """The batches of a caption split, for one of `world_size` ranks; arguments as for `Batches`.

    With `shuffle` (training) the caption of each picture is drawn anew each epoch, a function of the seed and the
    epoch alone; without it (evaluation) it is the caption with the epoch's number, modulo how many there are.
    """

    def __init__(self, split: CaptionSplit, batch_size: int, *, max_text_len: int, **options: Any) -> None:
        super().__init__(split, batch_size, **options)
        self.tokens, self.mask, _ = caption_tokens(split, max_text_len)
        self.count_N = torch.tensor([len(texts) for texts in split.captions])
        self.first_N = self.count_N.cumsum(0) - self.count_N
        if self.shuffle and self.rank == 0:
            _warn_of_cut(self.tokens, max_text_len)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[CaptionBatch]:
        """The batches of `epoch` from number `start` on, bit-equal to those of the whole epoch."""
        if self.shuffle:
            draw_N = torch.rand(len(self.split), generator=seeded_generator(self.seed, epoch, 0, 1))
            number_N = (draw_N * self.count_N).long()
        else:
            number_N = epoch % self.count_N
        row_N = self.first_N + number_N
        for images, share in self.pictures(epoch, start):
            rows = row_N[share]
            longest = int(self.mask[rows].sum(1).max())
            tokens, mask = (t[rows, :longest].to(self.device, non_blocking=True) for t in (self.tokens, self.mask))
            yield CaptionBatch(images, tokens, mask)


def _warn_of_cut(tokens: Tensor, max_text_len: int) -> None:
    """Say once how many captions fill all of `max_text_len` tokens: longer ones were cut to it."""
    full = int((tokens == END_ID).long().argmax(1).add(1).eq(max_text_len).sum())
    if full:
        log.warning(
            "%d of %d training captions have %d tokens or more and are cut there; a larger --max_text_len keeps more",
            *(full, len(tokens), max_text_len),
        )


def captions_in(cells: Iterable[Any]) -> list[Any]:
    """The captions in one row's cells, each a text or a list of texts; `check_captions` looks at what they are.

    A blank cell counts only where no other has a caption: not all pictures of a set have as many.
    """
    row = list(cells)
    told = [cell for cell in row if cell and not (isinstance(cell, str) and not cell.strip())]
    return [text for cell in told or row for text in (cell if isinstance(cell, list) else [cell])]


def check_captions(captions: Sequence[Sequence[Any]], where: Callable[[int], str]) -> None:
    """Raises `UserError` naming by `where(row)` the first picture without captions, or with one that is no text."""
    for row, texts in enumerate(captions):
        if not texts:
            raise UserError(f"{where(row)} has no caption: a picture must have at least one")
        for number, text in enumerate(texts):
            if text is None or (isinstance(text, str) and not text.strip()):
                raise UserError(f"{where(row)} has an empty caption (number {number}): write one or remove the picture")
            if not isinstance(text, str):
                raise UserError(f"{where(row)} has the caption {text!r} (number {number}): it must be text")
