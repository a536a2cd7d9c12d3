"""`train`, and what it shares with `test` and `train_test`: one line of flags for all three."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from diffmoe.commands.parsing import show, tell
from diffmoe.config.settings import Settings, parse_settings


def main(argv: Sequence[str]) -> int:
    """Train a model."""
    return run(parse_settings(argv, prog="diffmoe train", mode="train"))


def run(settings: Settings) -> int:
    """Train, test, or both; returns the exit code."""
    from diffmoe.runs import silent, test_run, train_run
    from diffmoe.storage.run_files import RunFiles
    from diffmoe.training.loop import StopRequested
    from diffmoe.training.parallel import is_first_process

    metrics: dict[str, Any] | None = None
    if settings.mode != "test":
        try:
            metrics = train_run(settings, _tell_aside if settings.as_json else tell)
        except StopRequested as stop:
            last = RunFiles(settings.data.dataset, settings.run.save_dir).last
            if is_first_process():
                print(f"stopped by {stop}, saved in {last}: the same command with --resume goes on", file=sys.stderr)
            return 128 + stop.signal_number
        if not is_first_process():
            return 0
    if settings.mode != "train":
        metrics = test_run(settings, silent if settings.as_json else tell)  # its lines say what they do
    return show(metrics, settings.as_json, lambda _: None)  # the tables were told


def _tell_aside(line: str) -> None:
    """How training goes on, where stdout is for the metrics alone."""
    print(line, file=sys.stderr, flush=True)
