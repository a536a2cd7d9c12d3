"""What a run tells after each epoch: TensorBoard, `history.csv`, `metrics.json`, a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffmoe.config import dataset_name
from diffmoe.config.settings import Settings
from diffmoe.data.pictures import PictureSpec
from diffmoe.evaluation.experts import BlockRouting
from diffmoe.model.parameters import parameter_counts
from diffmoe.storage.run_files import RunFiles
from diffmoe.training.display import as_clock, as_figure
from diffmoe.training.loop import Progress, seconds_left

ROUTING_MAPS = 4
"""Pictures whose routing TensorBoard shows."""


class EpochLog:
    """Written once an epoch is saved; makes no file before the first.

    A run that was saved and died before it told so is told of when it is resumed.

    Args:
        files: the run's.
        settings: the run's.
        model: whose parameters are counted.
        picture: what a picture is to it.
        sample: a batch whose routing is shown, the same at every epoch.
        tell: gets the line.
        silent: write nothing (all processes but the first).
    """

    def __init__(
        self,
        files: RunFiles,
        settings: Settings,
        model: nn.Module,
        picture: PictureSpec,
        sample: Sequence[Tensor],
        tell: Callable[[str], object],
        silent: bool,
    ) -> None:
        self.files, self.settings, self.tell, self.silent = files, settings, tell, silent
        self.counts, self.picture, self.pictures = parameter_counts(model), picture, sample[0][:ROUTING_MAPS]
        self.blocks: tuple[BlockRouting, ...] = ()
        self.events: Any = None
        self.purge_step = 0

    def see(self, blocks: tuple[BlockRouting, ...]) -> tuple[BlockRouting, ...]:
        """Where the sample's tokens go by now."""
        self.blocks = blocks
        return blocks

    @contextmanager
    def going_on(self, progress: Progress) -> Iterator[None]:
        """Around a run that starts at `progress`."""
        is_untold = bool(progress.history) and self.files.read_metrics().get("epochs") != progress.epoch
        # Events after the point where a resumed run starts are of a run that did not happen.
        self.purge_step = int(progress.history[-1]["step"]) if is_untold else progress.step + 1
        try:
            if is_untold:
                self.write(progress)
            yield
        finally:
            if self.events is not None:
                self.events.close()

    def write(self, progress: Progress) -> None:
        """The last row of `progress.history`; for TensorBoard also the load that was seen, and a picture of it."""
        if self.silent:
            return
        self._write_events(progress.history[-1])
        self.files.write_history(progress.history)
        config = self.settings.training
        self.files.update_metrics(
            {
                "dataset": dataset_name(self.settings.data.dataset),
                "mode": self.settings.mode,
                "seed": config.seed,
                "epochs": progress.epoch,
                "steps": progress.step,
                "images_per_second": progress.pictures / progress.seconds,
                "train_seconds": progress.seconds,
                **self.counts,
                "val_accuracy": progress.best,
            }
        )
        row = progress.history[-1]
        left = seconds_left(progress, round(progress.step / progress.epoch * config.epochs), config)
        self.tell(
            f"epoch {progress.epoch}/{config.epochs}  loss {row['train_loss']:.3f}  "
            f"train {row['train_accuracy']:.1%}  validation {row['val_accuracy']:.1%}  "
            f"{as_figure(row['images_per_second'])} images/s  {as_clock(math.ceil(left))} left"
        )

    def _write_events(self, row: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = self.events or SummaryWriter(self.files.folder, purge_step=self.purge_step)
        step = int(row["step"])
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self.events.add_scalar(name, value, step)
        for block in self.blocks:
            between = np.arange(block.num_experts + 1) - 0.5  # a bin for each expert
            chosen = block.expert_ids[block.expert_ids >= 0].numpy()
            self.events.add_histogram(f"expert_load/{block.place}_{block.layer}", chosen, step, bins=between)
        if self.blocks:
            from diffmoe.visualization.patches import routing_sheet  # matplotlib takes a second

            sheet = routing_sheet(self.picture.restore(self.pictures), self.blocks)
            self.events.add_image("routing_maps", sheet, step, dataformats="HWC")
        self.events.flush()
