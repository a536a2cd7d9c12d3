"""What training and testing need before they begin, for either task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from lightning_fabric import Fabric
from torch import nn

from diffmoe.checkpoint import DataInfo, load_checkpoint
from diffmoe.config import DataConfig, ModelConfig, UserError, dataset_name
from diffmoe.data import VOCAB_SIZE, Augmentation, CaptionDataset, ImageDataset
from diffmoe.files import check_writable
from diffmoe.hardware import keep_freed_memory, pick_device, use_fast_matmul
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.profiling import count_parameters
from diffmoe.runs import RunFiles
from diffmoe.settings import Settings
from diffmoe.training import Batches, Metrics

EVALUATION_BATCH = 500
"""Pictures or texts at a time in evaluation; no result depends on it."""


M = TypeVar("M", ImageClassifier, Captioner)
D = TypeVar("D", ImageDataset, CaptionDataset)


@dataclass(frozen=True)
class TrainingParts:
    """What a task hands to the loop."""

    model: ImageClassifier | Captioner
    objective: nn.Module
    """Holds the model; a batch -> loss and metrics."""
    batches: Batches
    validate: Callable[[], Metrics]
    """Scores the model on the validation split: val_loss, val_accuracy, and what the task adds."""
    info: DataInfo
    summary: str
    """The data in one line."""


@dataclass(frozen=True)
class Opened(Generic[M, D]):
    """What a task's test begins with."""

    path: Path
    model: M
    """On its device, in evaluation mode."""
    info: DataInfo
    data: D
    files: RunFiles
    pictures: Path
    """Folder for the pictures."""
    device: torch.device


def open_for_test(settings: Settings, head: type[M], load: Callable[..., D]) -> Opened[M, D]:
    """Check everything before work begins; then the model, which must have this head, and its data through `load`."""
    dataset = settings.data.dataset
    files = RunFiles(dataset, settings.run.save_dir)
    path = Path(settings.run.checkpoint or files.model)
    check_writable(files.folder)
    files.read_metrics()
    checkpoint = load_checkpoint(path)
    model, info = checkpoint.model, checkpoint.data
    if not isinstance(model, head):
        raise UserError(f"{path} was trained on {info.dataset}, for another task than {dataset}'s")
    check_fits(settings, model.config, path)
    splits = ("val_fraction", "test_fraction", "split_seed")  # so that testing never meets what training saw
    data_config = dataclasses.replace(settings.data, **{name: getattr(info, name) for name in splits})
    use_fast_matmul()
    keep_freed_memory()
    device = pick_device(settings.run.device)
    data = load(data_config, img_size=model.config.img_size, in_channels=model.config.in_channels)
    return Opened(path, model.to(device), info, data, files, pictures_folder(settings), device)


def pictures_folder(settings: Settings) -> Path:
    """Where this run's pictures go."""
    return Path(settings.visualization.output_dir) / dataset_name(settings.data.dataset)


def data_info(data: ImageDataset | CaptionDataset, config: DataConfig) -> DataInfo:
    """What a model file says of its data."""
    class_names = data.class_names if isinstance(data, ImageDataset) else ()
    fractions = (config.val_fraction, config.test_fraction, config.split_seed)
    return DataInfo(data.name, class_names, data.mean, data.std, *fractions)


def training_options(settings: Settings, fabric: Fabric, info: DataInfo) -> dict[str, Any]:
    """What the training batches of either task are told beside their split and size."""
    return {
        "mean": info.mean,
        "std": info.std,
        "device": fabric.device,
        "shuffle": True,
        "seed": settings.training.seed,
        "augment": Augmentation.from_config(settings.data),
        "rank": fabric.global_rank,
        "world_size": fabric.world_size,
        "num_workers": settings.data.num_workers,
    }


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
