"""`test`: how good a trained model is."""

from __future__ import annotations

from collections.abc import Sequence

from diffmoe.commands.train import run
from diffmoe.config.settings import parse_settings


def main(argv: Sequence[str]) -> int:
    """Score a trained model on the test split."""
    return run(parse_settings(argv, prog="diffmoe test", mode="test"))
