"""`train`: a task's parts through the loop, with what a run leaves on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import nn

from diffmoe.checkpoint import save_model
from diffmoe.commands.preparation import TrainingParts, check_vocabulary, parameter_counts
from diffmoe.config import UserError
from diffmoe.hardware import keep_freed_memory, make_fabric, use_fast_matmul
from diffmoe.runs import EpochWriter, RunFiles, load_run, save_run
from diffmoe.settings import Settings
from diffmoe.training import Hooks, Progress, fit, make_optimizer

HOUR = 3600
ELSEWHERE = ("data_dir", "num_workers", "max_memory_gb")
"""Settings that a resumed run may have others of: they say where the data is and how it is read."""


def train(settings: Settings, prepare: Callable[[Settings, Fabric], TrainingParts]) -> bool:
    """Train: writes the best model, what a resume needs, the history and the metrics.

    Returns whether this is the first of the processes, the one that goes on to test.
    """
    config, files = settings.training, RunFiles(settings.data.dataset, settings.run.save_dir)
    if settings.run.checkpoint is not None:
        raise UserError("checkpoint is for test: training writes <save_dir>/<dataset>_model.pth")
    files.check(settings.run)
    check_vocabulary(settings.model)
    fabric = make_fabric(settings.run)
    use_fast_matmul()
    keep_freed_memory()
    parts = prepare(settings, fabric)
    model = parts.model
    if settings.run.init is not None and not settings.run.resume:
        from diffmoe.pretrained import start_from

        for line in start_from(model, settings.run.init):
            fabric.print(line)
    optimizer = make_optimizer(model, config)
    wrapped, wrapped_optimizer = fabric.setup(
        cast(nn.Module, torch.compile(parts.objective)) if config.compile else parts.objective, optimizer
    )
    # Weights are equal on all ranks; dropout and the descriptions drawn from here on are not.
    torch.manual_seed(config.seed + 1 + fabric.global_rank)
    configs = {k: v for c in (model.config, config, settings.data) for k, v in dataclasses.asdict(c).items()}
    configs = {k: v for k, v in configs.items() if k not in ELSEWHERE}
    progress = Progress()
    if settings.run.resume:
        progress = load_run(files.last, fabric, model, optimizer, configs)
    elif fabric.is_global_zero:
        files.clear()
    counts = parameter_counts(model)
    fabric.print(
        f"{parts.summary}\nmodel: {counts['parameters_total'] / 1e6:.2f} M parameters, "
        f"{counts['parameters_active'] / 1e6:.2f} M active for a token; on {fabric.device}"
    )
    writer = EpochWriter(files, settings, counts, progress, silent=not fabric.is_global_zero)
    hooks = Hooks(
        validate=lambda: _validate(fabric, model, parts),
        on_best=lambda: save_model(files.model, model, parts.info) if fabric.is_global_zero else None,
        on_checkpoint=lambda p: save_run(files.last, fabric, model, optimizer, p, configs),
        on_epoch=writer.write,
        on_estimate=lambda seconds: _warn_if_slow(fabric, settings, seconds),
    )
    with writer:
        fit(fabric, wrapped, wrapped_optimizer, parts.batches, hooks, config, progress)
    fabric.print(f"best model: {files.model}   metrics: {files.metrics}")
    return fabric.is_global_zero


def _validate(fabric: Fabric, model: nn.Module, parts: TrainingParts) -> dict[str, float]:
    if fabric.world_size > 1:
        # BatchNorm's statistics are each rank's own: all take the first's, or they would disagree on when to stop.
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    with fabric.autocast():
        return parts.validate()


def _warn_if_slow(fabric: Fabric, settings: Settings, seconds: float) -> None:
    if seconds > HOUR and fabric.device.type == "cpu":
        smaller = "" if settings.run.preset == "tiny" else "; --preset tiny is a smaller model, made for a CPU"
        fabric.print(f"note: this will take about {seconds / HOUR:.1f} hours on this processor{smaller}")
