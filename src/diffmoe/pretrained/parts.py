"""What became of each part of a model that starts from another one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """What became of one part of our model."""

    name: str
    copied: bool
    how: str
    """What was copied, or why not."""

    def __str__(self) -> str:
        return f"{self.name}: {'copied' if self.copied else 'skipped'}, {self.how}"
