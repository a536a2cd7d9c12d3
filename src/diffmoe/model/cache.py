"""Keys and values that attention has already computed, kept while a caption is written token by token.

Shapes: R captions (rows), B pictures, H heads, L the longest caption in tokens, N image tokens, d width of a head.
"""

from __future__ import annotations

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


@dataclass
class CaptionCache:
    """All that writing the next token needs of the tokens before it, and of the picture."""

    text: list[KeyValues]
    """One for each block of the text tower."""
    fusion: list[KeyValues]
    """One for each layer of the fusion: the caption on itself."""
    pictures: list[tuple[Tensor, Tensor]]
    """One for each layer of the fusion: the keys and values of the picture's tokens, (B, H, N, d) each. A picture may
    have several captions, which are neighbours: R is a multiple of B."""

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
        self.pictures = [(k.index_select(0, pictures), v.index_select(0, pictures)) for k, v in self.pictures]
