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
from diffmoe.files import check_outside_data, check_writable
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
    files, pictures = RunFiles(settings.data.dataset, settings.run.save_dir), pictures_folder(settings)
    if settings.mode != "train":
        check_writable(pictures)
    task = TASKS[check_dataset(settings.data)]
    check_outside_data(files.folder, settings.data, "save_dir", "checkpoints")
    if settings.mode != "train":
        check_outside_data(pictures, settings.data, "output_dir", "visualizations")
        if task is captions:
            captions.check_captions_file(pictures / captions.FILE, settings.run.overwrite)
    if settings.mode != "test":
        try:
            is_first_process = train(settings, task.prepare)
        except StopRequested as stop:
            print(f"stopped by {stop}, saved in {files.last}: the same command with --resume goes on", file=sys.stderr)
            return 128 + stop.signal_number
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        if not is_first_process:
            return 0
    if settings.mode != "train":
        files.replace_earlier()
        task.test(settings)
    return 0
