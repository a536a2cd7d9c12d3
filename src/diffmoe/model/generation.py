"""Searching for captions: greedy, beam and sampling, over whatever gives the log-probabilities of the next token.

Nothing here knows of pictures or ids: a token is a column of the log-probabilities, one of which ends a caption.

Shapes: B pictures, W beams of a picture, R = B * W captions being written, t tokens so far, L the most tokens of a
caption (its end included), V columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffmoe.config import MAX_SEED, GenerationConfig, UserError

NEVER = float("-inf")
DECODINGS = ("greedy", "beam", "sample")


class Decoder(Protocol):
    """What a search asks. Captions of one picture are neighbouring rows."""

    def step(self, columns: Tensor) -> Tensor:
        """Captions so far (R, t) int64, t one more at each call, from 0 -> log-probabilities of the next (R, V).

        The result is the caller's, to be written on. R is B at first, or B * W.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Caption r goes on from what caption `rows[r]` was, of the same picture."""
        ...

    def keep(self, rows: Tensor, pictures: Tensor) -> None:
        """Go on with these captions and these pictures only, the captions' own."""
        ...


@dataclass(frozen=True)
class Generated:
    """One caption a picture."""

    tokens: Tensor
    """(B, T) int64. From `search`: columns up to the end, then -1. From `Captioner`: ids, see there."""
    log_probs: Tensor
    """(B,) float32, sum of the log-probabilities of the tokens, the end included, as the model gave them: before
    temperature, and before what may not come was taken out."""
    scores: Tensor
    """(B,) float32, log_probs over the number of tokens (the end included) to the power of length_penalty: what a beam
    search makes as high as it can."""


def check_generation(config: GenerationConfig, max_len: int) -> None:
    """Raises `UserError` where captions of at most `max_len` tokens, start and end included, cannot be written so."""
    if config.decoding not in DECODINGS:
        raise UserError(f"decoding is {config.decoding!r}: it must be one of {', '.join(DECODINGS)}")
    room = max_len - 2
    if config.min_caption_len > room:
        raise UserError(
            f"min_caption_len is {config.min_caption_len}: it must be at most {room}, max_text_len less start and end"
        )


def search(
    decoder: Decoder,
    num_pictures: int,
    end: int,
    max_tokens: int,
    config: GenerationConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Generated:
    """Write a caption for each picture.

    Args:
        decoder: gives log-probabilities; float32.
        num_pictures: B.
        end: the column that ends a caption.
        max_tokens: L; where nothing else ended a caption, its last token is the end.
        config: how; `check_generation` has passed it.
        seed: for 'sample': picture b draws from a generator of its own, seeded with seed + b.
        device: the decoder's.

    Raises:
        UserError: where the seed is none.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed!r}: it must be from 0 to {MAX_SEED}")
    if not num_pictures:
        return Generated(torch.empty(0, 1, dtype=torch.int64), torch.empty(0), torch.empty(0))
    columns = torch.empty(num_pictures * (config.beams if config.decoding == "beam" else 1), 0, dtype=torch.int64)
    best = _Best(num_pictures, end, max_tokens, config.length_penalty, device)
    if config.decoding == "beam":
        _beam_search(decoder, columns.to(device), best, config)
    else:
        uniform = _uniform(num_pictures, max_tokens, seed).to(device) if config.decoding == "sample" else None
        _one_by_one(decoder, columns.to(device), best, config, uniform)
    found = best.columns
    ends = found == end
    found = found.masked_fill(ends.cumsum(1) > ends.long(), -1)  # after the first end
    return Generated(found[:, : int((found >= 0).sum(1).max())], best.log_probs, best.scores)


class _Best:
    """The best finished caption of each picture so far."""

    def __init__(
        self, num_pictures: int, end: int, max_tokens: int, length_penalty: float, device: torch.device | str
    ) -> None:
        self.end, self.max_tokens, self.length_penalty = end, max_tokens, length_penalty
        self.columns = torch.full((num_pictures, max_tokens), end, device=device)  # `end` from the first one on
        self.log_probs = torch.full((num_pictures,), NEVER, device=device)
        self.scores = self.log_probs.clone()

    def offer(self, pictures: Tensor, columns: Tensor, log_probs: Tensor) -> None:
        """Finished captions of some pictures (P,), one each: (P, t) columns before the end, (P,) with it."""
        num_tokens = columns.shape[1]
        scores = log_probs / (num_tokens + 1) ** self.length_penalty
        better = scores > self.scores[pictures]
        rows = pictures[better]
        self.columns[rows, :num_tokens] = columns[better]
        self.columns[rows, num_tokens:] = self.end
        self.log_probs[rows] = log_probs[better]
        self.scores[rows] = scores[better]


def constrain(log_probs: Tensor, columns: Tensor, end: int, max_tokens: int, config: GenerationConfig) -> Tensor:
    """Take out what may not come after `columns` (R, t), in place: (R, V), -inf at what is out.

    No n-gram twice; no end before the minimum length, unless nothing else is left; nothing but the end at last.
    """
    num_tokens = columns.shape[1]
    end_R = log_probs[:, end].clone()
    if num_tokens + 1 >= max_tokens:
        log_probs.fill_(NEVER)[:, end] = end_R
        return log_probs
    n = config.no_repeat_ngram
    if 0 < n <= num_tokens:
        grams_RGn = columns.unfold(1, n, 1)
        begun_R1n = columns[:, None, num_tokens - n + 1 :]
        repeats_RG = (grams_RGn[..., :-1] == begun_R1n).all(-1)
        # The lowest of what is written to a column stays: one that is out for any of the n-grams is out.
        value = torch.full_like(repeats_RG, float("inf"), dtype=log_probs.dtype).masked_fill(repeats_RG, NEVER)
        log_probs.scatter_reduce_(1, grams_RGn[..., -1], value, "amin")
        log_probs[:, end] = end_R  # rows that have ended repeat it
    if num_tokens < config.min_caption_len:
        log_probs[:, end] = NEVER
        log_probs[:, end] = torch.where(log_probs.amax(1) == NEVER, end_R, NEVER)
    return log_probs


def _one_by_one(
    decoder: Decoder, columns: Tensor, best: _Best, config: GenerationConfig, uniform_BL: Tensor | None
) -> None:
    """Greedy, or sampled where there are numbers to draw with; `columns` (B, 0)."""
    pictures = torch.arange(len(columns), device=columns.device)  # of the rows that are left
    totals = torch.zeros(len(columns), device=columns.device)
    going = torch.ones_like(totals, dtype=torch.bool)
    for t in range(best.max_tokens):
        log_probs = constrain(decoder.step(columns), columns, best.end, best.max_tokens, config)
        column = log_probs.max(1).indices if uniform_BL is None else draw(log_probs, uniform_BL[pictures, t], config)
        totals = totals + log_probs.gather(1, column[:, None]).squeeze(1)
        ended = going & (column == best.end)
        before, columns = columns, torch.cat([columns, column[:, None]], 1)
        if not ended.any():
            continue
        best.offer(pictures[ended], before[ended], totals[ended])
        going = going & ~ended
        left = going.nonzero().squeeze(1)
        if not len(left):
            return
        if _worth_dropping(len(left), len(pictures)):
            decoder.keep(left, left)
            pictures, totals, going, columns = pictures[left], totals[left], going[left], columns[left]


def _worth_dropping(left: int, of: int) -> bool:
    """Whether the finished are half: each drop copies the cache and changes the shapes of all products."""
    return 2 * left <= of


def draw(log_probs: Tensor, uniform: Tensor, config: GenerationConfig) -> Tensor:
    """One column a row, (R,) int64, by inverting the distribution's sums at `uniform` (R,) in [0, 1).

    Of the sample_top_k likeliest columns, the likeliest that have sample_top_p together (Holtzman et al. 2020: the
    smallest such set), each with its probability to the power 1 / temperature, over their sum.
    """
    scaled = (log_probs - log_probs.amax(1, keepdim=True)) / config.temperature  # however cold, the likeliest is finite
    candidates = None
    if config.sample_top_k or config.sample_top_p < 1:
        scaled, candidates = scaled.topk(min(config.sample_top_k or scaled.shape[1], scaled.shape[1]), dim=1)
    probs = scaled.softmax(1)
    if config.sample_top_p < 1:
        before = probs.cumsum(1) - probs
        probs = probs.masked_fill(before >= config.sample_top_p, 0)
    sums = probs.cumsum(1)
    total = sums[:, -1:]
    # Under the total, or rounding could point past the last column that has any probability.
    point = torch.minimum(uniform[:, None].to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(sums, point, right=True)
    return (chosen if candidates is None else candidates.gather(1, chosen)).squeeze(1)


def _uniform(num_rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) in [0, 1), each row from its own generator, on the CPU: the same on every device."""
    rows = [torch.Generator().manual_seed((seed + row) % (MAX_SEED + 1)) for row in range(num_rows)]
    return torch.stack([torch.rand(length, generator=generator) for generator in rows])


def _beam_search(decoder: Decoder, columns: Tensor, best: _Best, config: GenerationConfig) -> None:
    """Sutskever et al. 2014, section 3.2; `columns` (B * W, 0). One beam is greedy search.

    At each step the W likeliest continuations of a picture's W captions count; those of them that end are finished.
    Places that become free go to the next likeliest, until W captions are finished.
    """
    width = config.beams
    pictures = torch.arange(len(columns) // width, device=columns.device)  # that are left
    totals_BW = torch.full((len(pictures), width), NEVER, device=columns.device)
    totals_BW[:, 0] = 0  # all beams are the same at first: only one counts
    num_finished = torch.zeros_like(pictures)
    for _ in range(best.max_tokens):
        allowed = constrain(decoder.step(columns), columns, best.end, best.max_tokens, config)
        parent, column, total = _candidates(totals_BW, allowed.unflatten(0, (-1, width)))
        parent = parent + torch.arange(0, len(columns), width, device=columns.device)[:, None]  # as rows
        ends = (column == best.end) & (total > NEVER)
        finished = ends[:, :width] & (num_finished < width)[:, None]
        num_finished = num_finished + finished.sum(1)
        # All that finish now are equally long: the first of them, the likeliest, is the best.
        some, first = finished.any(1), finished.int().argmax(1, keepdim=True)
        texts = columns[parent.gather(1, first).squeeze(1)]
        best.offer(pictures[some], texts[some], total.gather(1, first).squeeze(1)[some])

        # Those that go on, likeliest first; where they are too few, finished ones fill up and never count again.
        onward = ends.int().argsort(dim=1, stable=True)[:, :width]
        totals_BW = total.masked_fill(ends, NEVER).gather(1, onward)
        rows = parent.gather(1, onward).flatten()
        columns = torch.cat([columns[rows], column.gather(1, onward).view(-1, 1)], 1)
        left = ((num_finished < width) & (totals_BW[:, 0] > NEVER)).nonzero().squeeze(1)
        if not len(left):
            return
        decoder.select(rows)
        if _worth_dropping(len(left), len(pictures)):
            kept = torch.arange(len(columns), device=columns.device).view(-1, width)[left].flatten()
            decoder.keep(kept, left)
            pictures, num_finished = pictures[left], num_finished[left]
            totals_BW, columns = totals_BW[left], columns[kept]


def _candidates(totals_BW: Tensor, log_probs_BWV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 2 W likeliest continuations of each picture, best first: parent beam, column and total, each (B, 2 W).

    Twice as many as beams, so that W are left when all others end: each beam has one end only.
    """
    totals_BWV = totals_BW[..., None] + log_probs_BWV
    width, num_columns = totals_BWV.shape[1:]
    total, flat = totals_BWV.flatten(1).topk(min(2 * width, width * num_columns), dim=1)
    return flat // num_columns, flat % num_columns, total
