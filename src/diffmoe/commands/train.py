"""`train`, and what it shares with `test` and `train_test`: one line of flags for all three."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffmoe.commands.parsing import unread_is_no_error
from diffmoe.config.settings import Settings, parse_settings


def main(argv: Sequence[str]) -> int:
    """Train a model."""
    return run(parse_settings(argv, prog="diffmoe train", mode="train"))


def run(settings: Settings) -> int:
    """Train, test, or both; returns the exit code."""
    from diffmoe.runs import test_run, train_run
    from diffmoe.storage.run_files import RunFiles
    from diffmoe.training.loop import StopRequested
    from diffmoe.training.parallel import is_first_process

    if settings.mode != "test":
        try:
            train_run(settings, _tell)
        except StopRequested as stop:
            last = RunFiles(settings.data.dataset, settings.run.save_dir).last
            if is_first_process():
                print(f"stopped by {stop}, saved in {last}: the same command with --resume goes on", file=sys.stderr)
            return 128 + stop.signal_number
    if settings.mode != "train" and is_first_process():
        test_run(settings, _tell)
    return 0


def _tell(line: str) -> None:
    with unread_is_no_error():
        print(line, flush=True)
