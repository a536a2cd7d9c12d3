"""What training and testing need before they begin, for either task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffmoe.checkpoint import Checkpoint, DataInfo, load_checkpoint
from diffmoe.config import DataConfig, ModelConfig, UserError, dataset_name
from diffmoe.data import VOCAB_SIZE, ImageDataset, load_dataset
from diffmoe.files import check_writable
from diffmoe.hardware import keep_freed_memory, pick_device, use_fast_matmul
from diffmoe.model.heads import ImageClassifier
from diffmoe.profiling import count_parameters
from diffmoe.runs import RunFiles
from diffmoe.settings import Settings
from diffmoe.training import Batches, Metrics

EVALUATION_BATCH = 500
"""Pictures at a time in evaluation; no result depends on it."""


@dataclass(frozen=True)
class TrainingParts:
    """What a task hands to the loop."""

    model: ImageClassifier
    objective: nn.Module
    """Holds the model; a batch -> loss and metrics."""
    batches: Batches
    validate: Callable[[], Metrics]
    """Scores the model on the validation split: val_loss, val_accuracy, and what the task adds."""
    info: DataInfo
    summary: str
    """The data in one line."""


@dataclass(frozen=True)
class TestParts:
    """What a task's test begins with."""

    checkpoint: Checkpoint
    data: ImageDataset
    files: RunFiles
    pictures: Path
    device: torch.device
    path: Path


def open_for_test(settings: Settings, head: type[nn.Module]) -> TestParts:
    """Check everything before work begins, then load the model, which must have this head, and its data."""
    dataset = settings.data.dataset
    files = RunFiles(dataset, settings.run.save_dir)
    path = Path(settings.run.checkpoint or files.model)
    check_writable(files.folder)
    files.read_metrics()
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint.model, head):
        raise UserError(f"{path} was trained on {checkpoint.data.dataset}, for another task than {dataset}'s")
    check_fits(settings, checkpoint.model.config, path)
    info = checkpoint.data
    data_config = dataclasses.replace(
        settings.data, val_fraction=info.val_fraction, test_fraction=info.test_fraction, split_seed=info.split_seed
    )
    use_fast_matmul()
    keep_freed_memory()
    device = pick_device(settings.run.device)
    data = load_data(data_config, checkpoint.model.config)
    return TestParts(checkpoint, data, files, pictures_folder(settings), device, path)


def pictures_folder(settings: Settings) -> Path:
    """Where this run's pictures go."""
    return Path(settings.visualization.output_dir) / dataset_name(settings.data.dataset)


def load_data(config: DataConfig, model: ModelConfig, show: bool = True) -> ImageDataset:
    """The set at the model's picture size."""
    return load_dataset(config, img_size=model.img_size, in_channels=model.in_channels, progress=show)


def data_info(data: ImageDataset, config: DataConfig) -> DataInfo:
    """What a model file says of its data."""
    fractions = (config.val_fraction, config.test_fraction, config.split_seed)
    return DataInfo(data.name, data.class_names, data.mean, data.std, *fractions)


def check_vocabulary(config: ModelConfig) -> None:
    """Raises `UserError` where the text embedding has no row for some token."""
    if config.vocab_size < VOCAB_SIZE:
        raise UserError(f"vocab_size is {config.vocab_size}: the tokenizer needs at least {VOCAB_SIZE}")


def check_fits(settings: Settings, config: ModelConfig, path: Path) -> None:
    """Raises `UserError` where the user asked for a model that is not the one in the file."""
    for name in sorted(settings.given & {field.name for field in dataclasses.fields(ModelConfig)}):
        asked, found = getattr(settings.model, name), getattr(config, name)
        if asked != found:
            raise UserError(f"{name} is {asked!r}: the model in {path} has {found!r}")


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    """As metrics.json has them."""
    total, active = count_parameters(model)
    return {"parameters_total": total, "parameters_active": active}
