"""What each command does, composed from the other parts: data, model, loop, evaluation, pictures."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from diffmoe import evaluation
from diffmoe.checkpoint import DataInfo, load_checkpoint, save_model
from diffmoe.config import DataConfig, ModelConfig, UserError, dataset_name
from diffmoe.data import (
    VOCAB_SIZE,
    Augmentation,
    Batches,
    ImageDataset,
    Split,
    check_dataset,
    class_descriptions,
    load_dataset,
    normalize,
    read_picture,
    tokenize,
)
from diffmoe.files import check_writable
from diffmoe.hardware import keep_freed_memory, make_fabric, pick_device, use_fast_matmul
from diffmoe.model.heads import ImageClassifier
from diffmoe.profiling import count_parameters
from diffmoe.runs import RunFiles, load_run, save_run
from diffmoe.settings import Settings
from diffmoe.training import ClassificationObjective, Hooks, Metrics, Progress, StopRequested, fit, make_optimizer

EVALUATION_BATCH = 500
"""Pictures at a time in evaluation; no result depends on it."""
HOUR = 3600


def run(settings: Settings) -> int:
    """Train, test, or both; returns the exit code."""
    pick_device(settings.run.device)
    if settings.mode != "train":
        check_writable(_pictures_folder(settings))
    check_dataset(settings.data)
    if settings.mode != "test":
        try:
            is_first_process = train(settings)
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
        test(settings)
    return 0


def train(settings: Settings) -> bool:
    """Train: writes the best model, what a resume needs, the history and the metrics.

    Returns whether this is the first of the processes, the one that goes on to test.
    """
    config, files = settings.training, RunFiles(settings.data.dataset, settings.run.save_dir)
    if settings.run.checkpoint is not None:
        raise UserError("checkpoint is for test: training writes <save_dir>/<dataset>_model.pth")
    files.check(settings.run)
    if settings.model.vocab_size < VOCAB_SIZE:
        raise UserError(f"vocab_size is {settings.model.vocab_size}: the tokenizer needs at least {VOCAB_SIZE}")
    fabric = make_fabric(settings.run)
    use_fast_matmul()
    keep_freed_memory()
    with fabric.rank_zero_first():  # the others find the cache that it made
        data = _load_data(settings.data, settings.model, show=fabric.is_global_zero)
    model_config = _with_classes(settings, data)
    info = _data_info(data, settings.data)
    train_batches = Batches(
        data.train,
        config.batch_size,
        mean=info.mean,
        std=info.std,
        device=fabric.device,
        shuffle=True,
        seed=config.seed,
        augment=Augmentation.from_config(settings.data),
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        num_workers=settings.data.num_workers,
    )
    torch.manual_seed(config.seed)
    model = ImageClassifier(model_config, *_class_tokens(data, model_config.max_text_len))
    optimizer = make_optimizer(model, config)
    objective = ClassificationObjective(model, config.label_smoothing)
    wrapped, wrapped_optimizer = fabric.setup(
        cast(nn.Module, torch.compile(objective)) if config.compile else objective, optimizer
    )
    # Weights are equal on all ranks; dropout and the descriptions drawn from here on are not.
    torch.manual_seed(config.seed + 1 + fabric.global_rank)
    configs = {k: v for c in (model_config, config, settings.data) for k, v in dataclasses.asdict(c).items()}
    configs = {k: v for k, v in configs.items() if k not in ("data_dir", "num_workers", "max_memory_gb")}
    progress = Progress()
    if settings.run.resume:
        progress = load_run(files.last, fabric, model, optimizer, configs)
    elif fabric.is_global_zero:
        files.clear()
    _announce(fabric, settings, data, model)
    validation = _batches(data.validation, info, EVALUATION_BATCH, fabric.device, settings.data.num_workers)
    writer = _EpochWriter(fabric, files, settings, model, progress)
    hooks = Hooks(
        validate=lambda: _validate(fabric, model, validation),
        on_best=lambda: save_model(files.model, model, info) if fabric.is_global_zero else None,
        on_checkpoint=lambda p: save_run(files.last, fabric, model, optimizer, p, configs),
        on_epoch=writer.write,
        on_estimate=lambda seconds: _warn_if_slow(fabric, settings, seconds),
    )
    with writer:
        fit(fabric, wrapped, wrapped_optimizer, train_batches, hooks, config, progress)
    fabric.print(f"best model: {files.model}   metrics: {files.metrics}")
    return fabric.is_global_zero


def test(settings: Settings) -> None:
    """Score a model file on the test split: updates metrics.json, draws the pictures, prints the figures."""
    from diffmoe.visualization import figures

    files = RunFiles(settings.data.dataset, settings.run.save_dir)
    path = Path(settings.run.checkpoint or files.model)
    pictures = _pictures_folder(settings)
    check_writable(files.folder)
    files.read_metrics()
    checkpoint = load_checkpoint(path)
    model, info = checkpoint.model, checkpoint.data
    _check_fits(settings, model.config, path)
    data_config = dataclasses.replace(
        settings.data, val_fraction=info.val_fraction, test_fraction=info.test_fraction, split_seed=info.split_seed
    )
    use_fast_matmul()
    data = _load_data(data_config, model.config)
    if data.class_names != info.class_names:
        raise UserError(f"{path} was trained on the classes of {info.dataset}, which are not those of {data.name}")
    device = pick_device(settings.run.device)
    batches = _batches(data.test, info, EVALUATION_BATCH, device, data_config.num_workers)
    predictions = _predict(model.to(device), batches)
    metrics = evaluation.classification_metrics(predictions, len(info.class_names))
    files.update_metrics(
        {"dataset": data.name, "mode": settings.mode}
        | _parameter_counts(model)
        | {name if name == "zero_shot_accuracy" else f"test_{name}": value for name, value in metrics.items()}
        | {"class_names": list(info.class_names)}
    )
    show = settings.visualization
    shown = evaluation.pick_examples(predictions, show.examples, seed=0)
    drawn = {
        "confusion_matrix": figures.confusion_matrix(torch.tensor(metrics["confusion_matrix"]), info.class_names),
        "predictions": figures.prediction_grid(
            data.test.images[shown], data.test.labels[shown], predictions.probabilities[shown], info.class_names
        ),
        "calibration": figures.reliability_diagram(predictions),
        "per_class": figures.per_class(metrics["precision"], metrics["recall"], info.class_names, show.weakest_classes),
    }
    if history := files.read_history():
        drawn["training_curves"] = figures.training_curves(history)
    for name, figure in drawn.items():
        figures.save(figure, pictures / f"{name}.{show.figure_format}", dpi=show.dpi)
    _print_metrics(metrics, info.class_names, len(data.test))
    print(f"metrics: {files.metrics}   pictures: {pictures}/")


def predict(images: Sequence[str], checkpoint_path: str, top: int, device: str) -> list[dict[str, Any]]:
    """The `top` most probable classes of each picture: `[{image, predictions: [{class, probability}]}]`."""
    checkpoint = load_checkpoint(checkpoint_path)
    config, info = checkpoint.model.config, checkpoint.data
    pictures = [read_picture(path, img_size=config.img_size, in_channels=config.in_channels) for path in images]
    where = pick_device(device)
    model = checkpoint.model.to(where)
    probabilities: list[Tensor] = []
    with torch.inference_mode():
        classes = model.class_features()
        for chunk in torch.stack(pictures).split(EVALUATION_BATCH):
            out = model(normalize(chunk.to(where), info.mean, info.std), classes=classes)
            probabilities.append(out["logits"].float().softmax(-1).cpu())
    results = []
    for path, row in zip(images, torch.cat(probabilities), strict=True):
        best = row.topk(min(top, len(row)))
        ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found = [{"class": info.class_names[index], "probability": value} for index, value in ranked]
        results.append({"image": str(path), "predictions": found})
    return results


def _pictures_folder(settings: Settings) -> Path:
    return Path(settings.visualization.output_dir) / dataset_name(settings.data.dataset)


def _load_data(config: DataConfig, model: ModelConfig, show: bool = True) -> ImageDataset:
    return load_dataset(config, img_size=model.img_size, in_channels=model.in_channels, progress=show)


def _with_classes(settings: Settings, data: ImageDataset) -> ModelConfig:
    """The model's config with as many classes as the data has."""
    found = len(data.class_names)
    if "num_classes" in settings.given and settings.model.num_classes != found:
        raise UserError(f"num_classes is {settings.model.num_classes}: {data.name} has {found} classes")
    return dataclasses.replace(settings.model, num_classes=found)


def _check_fits(settings: Settings, config: ModelConfig, path: Path) -> None:
    """Raises `UserError` where the user asked for a model that is not the one in the file."""
    for name in sorted(settings.given & {field.name for field in dataclasses.fields(ModelConfig)}):
        asked, found = getattr(settings.model, name), getattr(config, name)
        if asked != found:
            raise UserError(f"{name} is {asked!r}: the model in {path} has {found!r}")


def _class_tokens(data: ImageDataset, max_len: int) -> tuple[Tensor, Tensor]:
    """The classes' descriptions as (C, S, T) tokens and mask."""
    sentences = class_descriptions(data.name, data.class_names)
    tokens, mask = tokenize([sentence for of_class in sentences for sentence in of_class], max_len)
    shape = (len(sentences), len(sentences[0]))
    return tokens.unflatten(0, shape), mask.unflatten(0, shape)


def _data_info(data: ImageDataset, config: DataConfig) -> DataInfo:
    fractions = (config.val_fraction, config.test_fraction, config.split_seed)
    return DataInfo(data.name, data.class_names, data.mean, data.std, *fractions)


def _batches(split: Split, info: DataInfo, size: int, device: torch.device, num_workers: int) -> Batches:
    return Batches(split, size, mean=info.mean, std=info.std, device=device, num_workers=num_workers)


def _predict(model: ImageClassifier, batches: Batches) -> evaluation.Predictions:
    """Over one epoch, the classes' descriptions read once."""
    with evaluation.evaluating(model), torch.inference_mode():
        classes = model.class_features()
    return evaluation.predict(model, batches.epoch(), classes=classes)


def _validate(fabric: Fabric, model: ImageClassifier, batches: Batches) -> Metrics:
    if fabric.world_size > 1:
        # BatchNorm's statistics are each rank's own: all take the first's, or they would disagree on when to stop.
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    with fabric.autocast():
        predictions = _predict(model, batches)
    right = predictions.predicted == predictions.labels
    loss = torch.nn.functional.cross_entropy(predictions.logits, predictions.labels)
    return {"val_loss": loss.item(), "val_accuracy": right.float().mean().item()}


def _parameter_counts(model: ImageClassifier) -> dict[str, int]:
    total, active = count_parameters(model)
    return {"parameters_total": total, "parameters_active": active}


def _announce(fabric: Fabric, settings: Settings, data: ImageDataset, model: ImageClassifier) -> None:
    total, active = count_parameters(model)
    fabric.print(
        f"{data.name}: {len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test "
        f"pictures, {len(data.class_names)} classes\n"
        f"model: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active for a token; on {fabric.device}"
    )


def _warn_if_slow(fabric: Fabric, settings: Settings, seconds: float) -> None:
    if seconds > HOUR and fabric.device.type == "cpu":
        smaller = "" if settings.run.preset == "tiny" else "; --preset tiny is a smaller model, made for a CPU"
        fabric.print(f"note: this will take about {seconds / HOUR:.1f} hours on this processor{smaller}")


class _EpochWriter:
    """After each epoch: history.csv, metrics.json, TensorBoard, and a line on the terminal."""

    def __init__(
        self, fabric: Fabric, files: RunFiles, settings: Settings, model: ImageClassifier, progress: Progress
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.fabric, self.files, self.settings = fabric, files, settings
        self.counts = _parameter_counts(model)
        # Events after the point where a resumed run starts are of a run that did not happen.
        self.events = SummaryWriter(files.folder, purge_step=progress.step + 1) if fabric.is_global_zero else None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.events is not None:
            self.events.close()

    def write(self, progress: Progress) -> None:
        if self.events is None:
            return
        row = progress.history[-1]
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self.events.add_scalar(name, value, progress.step)
        self.events.flush()
        self.files.write_history(progress.history)
        self.files.update_metrics(
            {
                "dataset": dataset_name(self.settings.data.dataset),
                "mode": self.settings.mode,
                "seed": self.settings.training.seed,
                "epochs": progress.epoch,
                "steps": progress.step,
                "images_per_second": progress.pictures / progress.seconds,
                "train_seconds": progress.seconds,
                **self.counts,
                "val_accuracy": progress.best,
            }
        )
        left = progress.seconds / progress.epoch * (self.settings.training.epochs - progress.epoch)
        print(
            f"epoch {progress.epoch}/{self.settings.training.epochs}  loss {row['train_loss']:.3f}  "
            f"train {row['train_accuracy']:.1%}  validation {row['val_accuracy']:.1%}  "
            f"{row['images_per_second']:,.0f} images/s  {time.strftime('%H:%M:%S', time.gmtime(math.ceil(left)))} left",
            flush=True,
        )


def _print_metrics(metrics: dict[str, Any], class_names: Sequence[str], num_pictures: int) -> None:
    print(f"test, {num_pictures:,} pictures")
    for name, label in (
        ("accuracy", "accuracy"),
        ("top5_accuracy", "top-5 accuracy"),
        ("zero_shot_accuracy", "zero-shot accuracy, by descriptions"),
        ("ece", "calibration error"),
    ):
        if name in metrics:
            print(f"  {label:36}{metrics[name]:7.2%}")
    width = max(len(name) for name in class_names)
    print(f"  {'class':{width}}  precision  recall")
    for row in zip(class_names, metrics["precision"], metrics["recall"], strict=True):
        print(f"  {row[0]:{width}}  {row[1]:9.1%}  {row[2]:6.1%}")
