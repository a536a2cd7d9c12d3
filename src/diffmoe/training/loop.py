"""The training loop: accumulation, validation, early stopping, exact resume.

`fit` is handed all it needs and can be read top to bottom. Data order and augmentation are functions of
(seed, epoch, batch), so that an exact resume needs the position, the weights, the optimizer and each rank's RNG only.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric

from diffmoe.config import TrainingConfig, UserError
from diffmoe.data.batches import PictureBatches
from diffmoe.storage.run_files import Metrics
from diffmoe.training.display import Display, as_clock, as_figure
from diffmoe.training.objective import Sums, Trainee, means
from diffmoe.training.optimizer import learning_rate
from diffmoe.training.parallel import any_of, total
from diffmoe.training.sizes import picture_size, resized

LONG_STEP = 5.0
"""Seconds of which what a first step alone needs is a small part."""


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
    sums: Sums = field(default_factory=dict)
    """Of this rank's current epoch. On the device until somebody reads."""
    history: list[Metrics] = field(default_factory=list)
    """One row for each finished epoch."""
    first_experts: dict[str, torch.Tensor] = field(default_factory=dict)
    """Where a sample's tokens went at the end of the last epoch (`evaluation.history.first_experts`)."""

    @property
    def is_best(self) -> bool:
        """Whether the weights are the best so far: just validated as such, or there was no validation yet."""
        return self.best is None or (self.window == 0 and self.epochs_since_best == 0)

    def add(self, sums: Sums, world_size: int) -> None:
        """One more step."""
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}
        self.step += 1
        self.window += 1
        self.pictures += int(sums["pictures"]) * world_size

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        """Of the fields in a checkpoint. Raises `TypeError` or `ValueError` where they are not such."""
        found = cls(**state)
        for name in ("epoch", "window", "step", "pictures", "epochs_since_best"):
            if not isinstance(value := getattr(found, name), int) or value < 0:
                raise ValueError(f"{name} is {value!r}")
        numbers = [found.seconds, found.best or 0.0, *(value for row in found.history for value in row.values())]
        if not all(isinstance(value, int | float) for value in numbers) or len(found.history) != found.epoch:
            raise ValueError("the history is not one of numbers")
        if not all(isinstance(value, torch.Tensor) for value in (*found.sums.values(), *found.first_experts.values())):
            raise ValueError("the sums and the first experts are not tensors")
        return found


class StopRequested(Exception):  # noqa: N818 - it is a request, not an error
    """Ctrl-C or SIGTERM: the step was finished and the run saved."""

    def __init__(self, received: list[int]) -> None:
        self.signal_number = received[0] if received else signal.SIGTERM  # none: another rank was told
        super().__init__(signal.Signals(self.signal_number).name)


@dataclass(frozen=True)
class Hooks:
    """What `fit` calls on its way. All ranks call all of them."""

    validate: Callable[[], Metrics]
    """Scores the model: `val_accuracy` is to rise."""
    save: Callable[[Progress], None]
    """After each epoch, and before stopping on a signal: save everything."""
    tell: Callable[[Progress], None]
    """After an epoch is saved: write the history."""
    estimate: Callable[[float], None]
    """Once, after a step or two: the seconds that the rest of training is going to take."""
    say: Callable[[str], object]
    """Where there is no terminal for a bar: a line now and then, of the first rank alone."""


def fit(trainee: Trainee, train: PictureBatches[Any], hooks: Hooks, progress: Progress) -> Progress:
    """Train to the end of `config.epochs` or of `config.max_seconds`, or until validation stops improving.

    Args:
        trainee: the model, its optimizer and the loop's settings.
        train: training batches of this rank.
        hooks: what to call on the way.
        progress: where to start: a fresh `Progress()`, or a saved one to resume. Updated in place.

    Raises:
        StopRequested: on SIGINT or SIGTERM, after the current step was finished and saved.
        UserError: when the loss is no longer finite; what has diverged is never saved.
    """
    fabric, config = trainee.fabric, trainee.config
    steps_per_epoch = math.ceil(len(train) / config.accumulation_steps)
    total_steps = config.epochs * steps_per_epoch
    display = Display(hooks.say, silent=not fabric.is_global_zero)
    clock = _Clock(fabric, progress)
    with _signals() as received:
        while (
            progress.epoch < config.epochs
            and not 0 < config.patience <= progress.epochs_since_best
            and (progress.window or _steps_worth(trainee, progress, total_steps) < total_steps)
        ):
            trainee.objective.train()
            begun = range(progress.step - progress.window, progress.step)
            rates = [learning_rate(step, total_steps, config) for step in begun]
            batches = iter(train.epoch(progress.epoch, start=progress.window * config.accumulation_steps))
            with display.epoch(f"epoch {progress.epoch + 1}/{config.epochs}", steps_per_epoch, progress.window):
                clock.start()
                while window := list(itertools.islice(batches, config.accumulation_steps)):
                    if (done := _steps_worth(trainee, progress, total_steps)) >= total_steps:
                        break
                    rates.append(learning_rate(done, total_steps, config))
                    trainee.make_whole(is_whole(done, total_steps, config))
                    size = picture_size(done, total_steps, config, trainee.model.config)
                    try:
                        sums = trainee.step([resized(batch, size) for batch in window], rates[-1])
                    except FloatingPointError as error:  # the router met what is not a number
                        raise _diverged(math.nan, progress.step) from error
                    progress.add(sums, fabric.world_size)
                    clock.read()
                    if (step_seconds := clock.step_seconds()) is not None:
                        hooks.estimate(seconds_left(progress, total_steps, config, step_seconds))
                    display.step(lambda: _standing(fabric, progress, seconds_left(progress, total_steps, config)))
                    if _told_to_stop(fabric, received, progress):
                        _finite_means(fabric, progress)
                        hooks.save(progress)
                        raise StopRequested(received)
                clock.read(wait=True)
            averages = _finite_means(fabric, progress)
            # By what is done now, not by the last step: a run that goes on from here had none.
            trainee.make_whole(is_whole(_steps_worth(trainee, progress, total_steps), total_steps, config))
            # From the first rank: all must agree on what is best, and on when to stop.
            validation = fabric.broadcast(hooks.validate())
            _finish_epoch(progress, rates, averages, validation)
            hooks.save(progress)
            hooks.tell(progress)
            if _told_to_stop(fabric, received, progress):
                raise StopRequested(received)
    return progress


class _Clock:
    """Adds the time that training takes to `progress`, validation apart; tells early on what a step takes."""

    def __init__(self, fabric: Fabric, progress: Progress) -> None:
        self.device, self.progress = fabric.device, progress
        self.first: list[float] = []
        """The seconds of the first steps, until they tell enough."""
        self.has_told = False

    def start(self) -> None:
        """An epoch's first step begins."""
        self.last = time.perf_counter()

    def read(self, wait: bool = False) -> None:
        """A step is done. `wait` for a GPU, which would still be at work on what it was told: once an epoch."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.progress.seconds += now - self.last
        if not (wait or self.has_told):
            self.first.append(now - self.last)
        self.last = now

    def step_seconds(self) -> float | None:
        """Once, when it is known: the shorter of two, as the first one warms up, which a long one makes up for."""
        if self.has_told or (len(self.first) < 2 and self.first[0] < LONG_STEP):
            return None
        self.has_told = True
        return min(self.first)


def _steps_worth(trainee: Trainee, progress: Progress, total_steps: int) -> float:
    """Steps done, or as many as the time gone is worth where `max_seconds` is nearer; all ranks must ask."""
    if not (limit := trainee.config.max_seconds):
        return progress.step
    seconds = float(total(trainee.fabric, torch.tensor(progress.seconds), mean=True))
    return max(progress.step, seconds / limit * total_steps)


def is_whole(step: float, total_steps: int, config: TrainingConfig) -> bool:
    """Whether a routed pool is one FFN in optimizer step `step` (from 0), and where that many are done."""
    return step < config.dense_fraction * total_steps


def seconds_left(
    progress: Progress, total_steps: int, config: TrainingConfig, step_seconds: float | None = None
) -> float:
    """Of training, at so many seconds a step; None: at the speed that it has had so far."""
    pace = progress.seconds / progress.step if step_seconds is None else step_seconds
    left = pace * (total_steps - progress.step)
    return max(min(left, config.max_seconds - progress.seconds), 0.0) if config.max_seconds else left


def _finish_epoch(progress: Progress, rates: list[float], averages: Metrics, validation: Metrics) -> None:
    if not math.isfinite(loss := validation.get("val_loss", 0.0)):
        raise _diverged(loss, progress.step)
    progress.epoch += 1
    progress.history.append(
        {
            "epoch": progress.epoch,
            "step": progress.step,
            "lr": rates[-1],
            "train_loss": averages.pop("loss"),
            "train_accuracy": averages.pop("accuracy"),
            **averages,
            **validation,
            "images_per_second": progress.pictures / progress.seconds,
            "seconds": progress.seconds,
            "peak_lr": max(rates),
        }
    )
    if progress.best is None or validation["val_accuracy"] > progress.best:
        progress.best, progress.epochs_since_best = validation["val_accuracy"], 0
    else:
        progress.epochs_since_best += 1
    progress.window, progress.sums = 0, {}


def _finite_means(fabric: Fabric, progress: Progress) -> Metrics:
    """Of all ranks, so that all of them stop where the loss is no number."""
    names = list(progress.sums)
    everywhere = total(fabric, torch.stack([progress.sums[name].float().cpu() for name in names]))
    averages = means(dict(zip(names, everywhere, strict=True)))
    if not math.isfinite(averages["loss"]):
        raise _diverged(averages["loss"], progress.step)
    return averages


def _diverged(loss: float, step: int) -> UserError:
    return UserError(f"the loss is {loss} at step {step}: lower --lr or raise --warmup_fraction")


def _standing(fabric: Fabric, progress: Progress, seconds: float) -> str:
    """Loss, accuracy, rate and the time that is left."""
    averages = means(progress.sums)
    if fabric.world_size == 1 and not math.isfinite(averages["loss"]):
        raise _diverged(averages["loss"], progress.step)
    left = as_clock(seconds)
    told = f"loss {averages['loss']:.3f}  accuracy {averages['accuracy']:.1%}"
    return f"{told}  {as_figure(progress.pictures / progress.seconds)} images/s  {left} left"


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


def _told_to_stop(fabric: Fabric, received: list[int], progress: Progress) -> bool:
    """Whether any rank got a signal: all must leave after the same step. All raise where one's loss is no number."""
    if fabric.world_size == 1:
        return bool(received)
    diverged = bool(progress.sums) and not math.isfinite(float(progress.sums["task_loss"]))
    stop, any_diverged = any_of(fabric, bool(received), diverged)
    if any_diverged:
        raise _diverged(math.nan, progress.step)
    return stop
