"""What each command does, composed from the other parts: data, model, loop, evaluation, pictures.

A model is trained for one of two tasks, `classification` or `captions`; which one it is the dataset tells.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from diffmoe.commands import captions, classification
from diffmoe.commands.preparation import pictures_folder
from diffmoe.commands.training import train
from diffmoe.data import check_dataset
from diffmoe.files import check_writable
from diffmoe.hardware import pick_device
from diffmoe.runs import RunFiles
from diffmoe.settings import Settings
from diffmoe.training import StopRequested

__all__ = ["run"]

TASKS: dict[str, ModuleType] = {"classification": classification, "captions": captions}
"""Each has `prepare`, which gives the loop what it needs, and `test`."""


def run(settings: Settings) -> int:
    """Train, test, or both; returns the exit code."""
    pick_device(settings.run.device)
    if settings.mode != "train":
        check_writable(pictures_folder(settings))
    task = TASKS[check_dataset(settings.data)]
    if settings.mode != "test":
        try:
            is_first_process = train(settings, task.prepare)
        except StopRequested as stop:
            last = RunFiles(settings.data.dataset, settings.run.save_dir).last
            print(f"stopped by {stop}, saved in {last}: the same command with --resume goes on", file=sys.stderr)
            return 128 + stop.signal_number
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        if not is_first_process:
            return 0
    if settings.mode != "train":
        task.test(settings)
    return 0
