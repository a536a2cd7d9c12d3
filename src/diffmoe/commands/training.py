"""`train`: a task's parts through the loop, with what a run leaves on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from diffmoe.checkpoint import DataInfo, Head, save_model
from diffmoe.commands.preparation import TrainingParts, check_vocabulary, parameter_counts
from diffmoe.config import UserError
from diffmoe.evaluation.experts import trace_experts
from diffmoe.evaluation.history import routing_metrics
from diffmoe.hardware import keep_freed_memory, make_fabric, use_fast_matmul
from diffmoe.runs import EpochWriter, RunFiles, load_run, save_run
from diffmoe.settings import Settings
from diffmoe.training import Hooks, Progress, fit, make_optimizer

HOUR = 3600
ROUTING_MAPS = 4
"""Pictures whose routing TensorBoard shows."""
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
    sample = next(iter(parts.batches.epoch()))  # before the seed is set: workers draw from torch's generator
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
    counts = parameter_counts(model)
    fabric.print(
        f"{parts.summary}\nmodel: {counts['parameters_total'] / 1e6:.2f} M parameters, "
        f"{counts['parameters_active'] / 1e6:.2f} M active for a token; on {fabric.device}"
    )
    saver = Saver(files, fabric, model, optimizer, parts.info, configs, is_first=not settings.run.resume)
    writer = EpochWriter(files, settings, counts, progress, silent=not fabric.is_global_zero)
    hooks = Hooks(
        validate=lambda: _validate(fabric, model, parts),
        on_epoch=lambda p: _end_epoch(sample, p, saver, writer),
        on_stop=saver.save,
        on_estimate=lambda seconds: _warn_if_slow(fabric, settings, seconds),
    )
    with writer:
        fit(fabric, wrapped, wrapped_optimizer, parts.batches, hooks, config, progress)
    fabric.print(f"best model: {files.model}   metrics: {files.metrics}")
    return fabric.is_global_zero


@dataclass
class Saver:
    """Saves a run: the model where it is the best so far, and all that an exact resume needs."""

    files: RunFiles
    fabric: Fabric
    model: Head
    optimizer: Optimizer
    info: DataInfo
    configs: Mapping[str, Any]
    """The settings that a resumed run must share."""
    is_first: bool
    """Nothing of this run is saved yet; its first files replace those of an earlier run."""

    def save(self, progress: Progress) -> None:
        """Every rank must call it. The model comes first: a `last.ckpt` that is ahead would never write it again."""
        place = nullcontext(self.files)
        if self.is_first and self.fabric.is_global_zero:
            place = self.files.replacing()
        with place as files:
            if progress.is_best and self.fabric.is_global_zero:
                save_model(files.model, self.model, self.info)
            save_run(files.last, self.fabric, self.model, self.optimizer, progress, self.configs)
        self.is_first = False


def _validate(fabric: Fabric, model: nn.Module, parts: TrainingParts) -> dict[str, float]:
    if fabric.world_size > 1:
        # BatchNorm's statistics are each rank's own: all take the first's, or they would disagree on when to stop.
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    with fabric.autocast():
        return parts.validate()


def _end_epoch(sample: Any, progress: Progress, saver: Saver, writer: EpochWriter) -> None:
    """Add to the epoch's row where the experts' load is by now, on one batch, the same at every epoch; save; tell."""
    with saver.fabric.autocast():
        blocks = trace_experts(saver.model, [sample]).blocks
    progress.history[-1] |= routing_metrics(blocks)
    saver.save(progress)  # first: whatever fails in the telling, the epoch is not lost
    routing_maps = None
    if blocks:
        from diffmoe.visualization.patches import routing_sheet  # matplotlib takes a second

        routing_maps = routing_sheet(_as_pictures(sample[0][:ROUTING_MAPS], saver.info), blocks)
    writer.write(progress, blocks, routing_maps)


def _as_pictures(images: Tensor, info: DataInfo) -> Tensor:
    """Normalised pictures (B, C, H, W) as uint8 again."""
    mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    return (255 * (images.cpu() * std_C11 + mean_C11)).round().clamp(0, 255).byte()


def _warn_if_slow(fabric: Fabric, settings: Settings, seconds: float) -> None:
    if seconds > HOUR and fabric.device.type == "cpu":
        smaller = "" if settings.run.preset == "tiny" else "; --preset tiny is a smaller model, made for a CPU"
        fabric.print(f"note: this will take about {seconds / HOUR:.1f} hours on this processor{smaller}")
