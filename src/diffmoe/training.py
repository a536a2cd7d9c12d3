"""The training loop: AdamW, warm-up and cosine, accumulation, clipping, early stopping, exact resume.

`fit` is handed all it needs and can be read top to bottom. Data order and augmentation are functions of
(seed, epoch, batch), so that an exact resume needs the position, the weights, the optimizer and each rank's RNG only.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

from diffmoe.config import TrainingConfig, UserError

Metrics = dict[str, float]


class Batches(Protocol):
    """What `fit` reads: an epoch of batches, the pictures first, from a given batch on."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterable[Any]: ...


@dataclass
class Progress:
    """Where a run stands: all of it that is not weights."""

    epoch: int = 0
    """Finished epochs."""
    window: int = 0
    """Optimizer steps done in the current epoch."""
    step: int = 0
    """Optimizer steps done in all."""
    pictures: int = 0
    """Pictures seen in all, over all devices."""
    seconds: float = 0.0
    """Time spent in training, validation apart."""
    best: float | None = None
    """Best validation score so far."""
    epochs_since_best: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of this rank's current epoch: each metric times pictures, and `pictures`. On the device until somebody reads."""
    history: list[Metrics] = field(default_factory=list)
    """One row for each finished epoch."""

    @property
    def is_best(self) -> bool:
        """Whether the weights are the best so far: just validated as such, or there was no validation yet."""
        return self.best is None or (self.window == 0 and self.epochs_since_best == 0)

    def means(self) -> Metrics:
        """Means of the current epoch's metrics so far. Waits for the device."""
        pictures = float(self.sums["pictures"])
        return {name: float(total) / pictures for name, total in self.sums.items() if name != "pictures"}

    def state(self) -> dict[str, Any]:
        """As a dict of tensors and numbers, for a checkpoint."""
        return dict(vars(self))


class StopRequested(Exception):  # noqa: N818 - it is a request, not an error
    """Ctrl-C or SIGTERM: the step was finished and the run saved."""

    def __init__(self, received: list[int]) -> None:
        self.signal_number = received[0] if received else signal.SIGTERM  # none: another rank was told
        super().__init__(signal.Signals(self.signal_number).name)


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear rise to the peak, then a cosine down."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    floor = config.final_lr_fraction
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """AdamW, fused, with weight decay on matrices only: not on biases, norms, embeddings or positions."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        # The routed experts stack E vectors into a matrix: the leaf's name tells a bias from a weight.
        is_matrix = parameter.dim() >= 2 and (leaf == "weight" or leaf.endswith("_weight") or leaf == "keys")
        (decayed if is_matrix and "embedding" not in name else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


@dataclass(frozen=True)
class Hooks:
    """What `fit` calls on its way. All ranks call all of them."""

    validate: Callable[[], Metrics]
    """Scores the model."""
    on_epoch: Callable[[Progress], None]
    """After each epoch: save everything, then write the history."""
    on_stop: Callable[[Progress], None]
    """Before stopping in mid-epoch, on a signal: save everything."""
    on_estimate: Callable[[float], None]
    """Once, early on: the whole training's expected seconds."""


def fit(
    fabric: Fabric,
    objective: _FabricModule,
    optimizer: _FabricOptimizer,
    train: Batches,
    hooks: Hooks,
    config: TrainingConfig,
    progress: Progress,
    monitor: str = "val_accuracy",
) -> Progress:
    """Train to the end of `config.epochs`, or until validation stops improving.

    Args:
        fabric: launched.
        objective: holds the model; a batch -> the loss to minimise, and metrics to report. Set up by `fabric`.
        optimizer: set up by `fabric`.
        train: training batches of this rank.
        hooks: what to call on the way.
        config: the loop's settings.
        progress: where to start: a fresh `Progress()`, or a saved one to resume. Updated in place.
        monitor: the metric of `validate` that is to rise.

    Raises:
        StopRequested: on SIGINT or SIGTERM, after the current step was finished and saved.
        UserError: when the loss is no longer finite; what has diverged is never saved.
    """
    steps_per_epoch = math.ceil(len(train) / config.accumulation_steps)
    total_steps = config.epochs * steps_per_epoch
    estimate_at = progress.step + 20
    with _signals() as received:
        while progress.epoch < config.epochs and not _is_stale(progress, config):
            objective.train()
            batches = iter(train.epoch(progress.epoch, start=progress.window * config.accumulation_steps))
            with _bar(fabric, progress, config.epochs, steps_per_epoch) as bar:
                started = time.perf_counter()
                while window := list(itertools.islice(batches, config.accumulation_steps)):
                    rate = learning_rate(progress.step, total_steps, config)
                    try:
                        sums = train_step(fabric, objective, optimizer, window, rate, config.clip_norm)
                    except FloatingPointError as error:  # the router met what is not a number
                        raise _diverged(math.nan, progress.step) from error
                    now = time.perf_counter()
                    _advance(progress, sums, fabric.world_size, now - started)
                    started = now
                    _show(bar, progress, total_steps)
                    if progress.step == estimate_at:
                        hooks.on_estimate(progress.seconds / progress.step * total_steps)
                    if _told_to_stop(fabric, received):
                        _finite_means(progress)
                        hooks.on_stop(progress)
                        raise StopRequested(received)
            _finish_epoch(progress, learning_rate(progress.step - 1, total_steps, config), hooks.validate(), monitor)
            hooks.on_epoch(progress)
            if _told_to_stop(fabric, received):
                raise StopRequested(received)
    return progress


def train_step(
    fabric: Fabric,
    objective: _FabricModule,
    optimizer: _FabricOptimizer,
    window: list[Any],
    rate: float,
    clip_norm: float,
) -> dict[str, Tensor]:
    """One optimizer step on a window of batches: the gradient of the mean over all its pictures, ragged or not.

    Returns:
        Each metric summed over the window's pictures, and `pictures`; tensors, so that nothing waits for the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    pictures = sum(len(batch[0]) for batch in window)
    sums: dict[str, Tensor] = {"pictures": torch.tensor(float(pictures))}
    for number, batch in enumerate(window):
        # Gradients travel between devices once a window, with its last batch.
        with fabric.no_backward_sync(objective, enabled=number + 1 < len(window)):
            loss, metrics = objective(*batch)
            fabric.backward(loss * (len(batch[0]) / pictures))
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value.detach() * len(batch[0])
    if clip_norm > 0:
        fabric.clip_gradients(objective, optimizer, max_norm=clip_norm, error_if_nonfinite=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums


def _advance(progress: Progress, sums: Mapping[str, Tensor], world_size: int, seconds: float) -> None:
    progress.sums = {name: progress.sums.get(name, 0) + value for name, value in sums.items()}
    progress.step += 1
    progress.window += 1
    progress.pictures += int(sums["pictures"]) * world_size
    progress.seconds += seconds


def _finish_epoch(progress: Progress, rate: float, validation: Metrics, monitor: str) -> None:
    means = _finite_means(progress)
    if not math.isfinite(loss := validation.get("val_loss", 0.0)):
        raise _diverged(loss, progress.step)
    progress.epoch += 1
    progress.history.append(
        {
            "epoch": progress.epoch,
            "step": progress.step,
            "lr": rate,
            "train_loss": means.pop("loss"),
            "train_accuracy": means.pop("accuracy", math.nan),
            **means,
            **validation,
            "images_per_second": progress.pictures / progress.seconds,
            "seconds": progress.seconds,
        }
    )
    improved = progress.best is None or validation[monitor] > progress.best
    progress.best = validation[monitor] if improved else progress.best
    progress.epochs_since_best = 0 if improved else progress.epochs_since_best + 1
    progress.window, progress.sums = 0, {}


def _finite_means(progress: Progress) -> Metrics:
    means = progress.means()
    if not math.isfinite(means["loss"]):
        raise _diverged(means["loss"], progress.step)
    return means


def _diverged(loss: float, step: int) -> UserError:
    return UserError(f"the loss is {loss} at step {step}: lower --lr or raise --warmup_fraction")


def _is_stale(progress: Progress, config: TrainingConfig) -> bool:
    return 0 < config.patience <= progress.epochs_since_best


def _bar(fabric: Fabric, progress: Progress, epochs: int, steps: int) -> tqdm[Any]:
    return tqdm(
        desc=f"epoch {progress.epoch + 1}/{epochs}",
        total=steps,
        initial=progress.window,
        unit="step",
        leave=False,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {postfix}",
        disable=None if fabric.is_global_zero else True,  # None: shown on a terminal only
    )


def _show(bar: tqdm[Any], progress: Progress, total_steps: int) -> None:
    """Move the bar; its numbers wait for the device, so they are read only when it is redrawn."""
    if bar.update() and not bar.disable:
        means = _finite_means(progress)
        left = time.strftime("%H:%M:%S", time.gmtime(progress.seconds / progress.step * (total_steps - progress.step)))
        accuracy = f"accuracy {means['accuracy']:.1%}  " if "accuracy" in means else ""
        speed = progress.pictures / progress.seconds
        bar.set_postfix_str(f"loss {means['loss']:.3f}  {accuracy}{speed:,.0f} images/s  {left} left", refresh=False)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of dying of it; a second one does what it always did."""
    received: list[int] = []
    former: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, former[number])

    for number in former:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _told_to_stop(fabric: Fabric, received: list[int]) -> bool:
    """Whether any rank got a signal: all must leave after the same step."""
    if fabric.world_size == 1:
        return bool(received)
    told = fabric.all_reduce(torch.tensor(float(bool(received)), device=fabric.device), reduce_op="sum")
    return bool(cast(Tensor, told) > 0)
