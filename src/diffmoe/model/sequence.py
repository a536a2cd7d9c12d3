"""A sequence on its way through blocks: its tokens, which of them are real, and what was read before them.

Shapes: B batch, N tokens of the sequence, S tokens of what it reads, D width, H heads, d width of a head, R captions
being written (rows), L the longest caption in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


class KeyValues:
    """Keys and values of one self-attention, of the tokens that it has read: written in place, never moved."""

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.length = 0
        """Tokens read so far."""
        self._stored: Tensor | None = None  # (2, R, H, L, d), made when the first token tells its shape

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (R, H, n, d) of n new tokens -> those of all tokens read so far, the new ones included."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self._stored is None:
            self._stored = keys.new_empty(2, *keys.shape[:2], self.max_len, keys.shape[3])
        all_keys, all_values = self._stored.narrow(3, 0, self.length).unbind(0)
        all_keys.narrow(2, start, keys.shape[2]).copy_(keys)
        all_values.narrow(2, start, keys.shape[2]).copy_(values)
        return all_keys, all_values

    def select(self, rows: Tensor) -> None:
        """Row r becomes what row `rows[r]` was; their number may change."""
        if self._stored is not None:
            self._stored = self._stored.index_select(1, rows)


@dataclass(frozen=True)
class TokenSequence:
    """What a block is given."""

    tokens: Tensor
    """(B, N, D)."""
    mask: Tensor | None = None
    """(B, N) bool, True at real tokens; None when all are."""
    causal: bool = False
    """A token sees itself and the tokens before it only."""
    past: Sequence[KeyValues] | None = None
    """Of the tokens before these, one for each layer of the stack, by its number; extended by these tokens."""

    def at(self, tokens: Tensor) -> TokenSequence:
        """The same sequence a step further on: (B, N, D)."""
        return TokenSequence(tokens, self.mask, self.causal, self.past)


@dataclass(frozen=True)
class Context:
    """What a sequence reads in the fusion, from the other modality. All its tokens are seen by all of the sequence."""

    tokens: Tensor
    """(B, S, D)."""
    mask: Tensor | None = None
    """(B, S) bool, True at real tokens; None when all are."""
    keys_values: Sequence[tuple[Tensor, Tensor]] | None = None
    """What each layer of the fusion computes of the tokens, (B, H, S, d) each, where that was done before."""


@dataclass
class CaptionCache:
    """All that writing the next token needs of the tokens before it, and of the picture."""

    text: list[KeyValues]
    """One for each block of the text tower."""
    fusion: list[KeyValues]
    """One for each layer of the fusion: the caption on itself."""
    pictures: Context
    """With keys and values. A picture may have several captions, which are neighbours: R is a multiple of B."""

    @property
    def length(self) -> int:
        """Tokens read so far: the next one's position."""
        return self.text[0].length

    def select(self, rows: Tensor) -> None:
        """Caption r goes on from what caption `rows[r]` was, a caption of the same picture."""
        for part in self.text + self.fusion:
            part.select(rows)

    def keep(self, rows: Tensor, pictures: Tensor) -> None:
        """Forget all but these captions and these pictures, the captions' own."""
        self.select(rows)
        assert self.pictures.keys_values is not None
        kept = [(k.index_select(0, pictures), v.index_select(0, pictures)) for k, v in self.pictures.keys_values]
        self.pictures = Context(self.pictures.tokens.index_select(0, pictures), None, kept)
