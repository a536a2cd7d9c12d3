"""`train_test`: both, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from diffmoe.commands.train import run
from diffmoe.config.settings import parse_settings


def main(argv: Sequence[str]) -> int:
    """Train a model, then score it."""
    return run(parse_settings(argv, prog="diffmoe train_test", mode="train_test"))
