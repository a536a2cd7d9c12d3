"""The loop: patience, ragged windows, what a row holds, losses that are no numbers, signals."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.training.signals import send_at
from tests.training.trainees import Diverging, ListBatches, Regression, made_of, make_trainee
from torch import Tensor

from diffmoe.config import TrainingConfig, UserError
from diffmoe.model.heads import Head, Score
from diffmoe.model.outputs import Output
from diffmoe.training import display, loop
from diffmoe.training.loop import Hooks, Progress, StopRequested, fit
from diffmoe.training.objective import Trainee
from diffmoe.training.optimizer import learning_rate


class Recorder:
    """Hooks that write down when they were called; validation scores come from a list."""

    def __init__(self, scores: list[float] | None = None, at_epoch_end: Callable[[], None] = lambda: None) -> None:
        self.scores, self.at_epoch_end = iter(scores or [0.5] * 1000), at_epoch_end
        self.best_after: list[int] = []
        self.checkpoints: list[int] = []
        self.rows: list[dict[str, float]] = []
        self.estimates: list[float] = []
        self.lines: list[str] = []

    def validate(self) -> dict[str, float]:
        self.at_epoch_end()
        return {"val_accuracy": next(self.scores)}

    def save(self, progress: Progress) -> None:
        assert len(self.rows) == len(progress.history) - (progress.window == 0)  # told after it is saved
        self.checkpoints.append(progress.step)
        if progress.is_best and progress.window == 0:
            self.best_after.append(progress.epoch)

    def hooks(self) -> Hooks:
        return Hooks(
            validate=self.validate,
            save=self.save,
            tell=lambda progress: self.rows.append(progress.history[-1]),
            estimate=self.estimates.append,
            say=self.lines.append,
        )


def run_fit(
    recorder: Recorder, sizes: tuple[int, ...] = (4, 4, 2), model: Head | None = None, **config: Any
) -> Progress:
    return fit(make_trainee(model or Regression(), **config), ListBatches(*sizes), recorder.hooks(), Progress())


class TestFit:
    def test_stops_after_patience_epochs_without_a_better_one(self):
        recorder = Recorder([0.5, 0.6, 0.6, 0.55, 0.9])  # equal is not better
        progress = run_fit(recorder, epochs=10, patience=2)
        assert progress.epoch == 4
        assert progress.best == 0.6
        assert recorder.best_after == [1, 2]

    def test_without_patience_it_goes_to_the_end(self):
        assert run_fit(Recorder([0.5] + [0.1] * 5), epochs=6).epoch == 6

    def test_steps_and_checkpoints_with_a_ragged_last_window(self):
        recorder = Recorder()
        progress = run_fit(recorder, sizes=(4, 4, 4, 4, 2), epochs=2, accumulation_steps=2)
        assert progress.step == 6  # windows of 2, 2 and 1 batches
        assert progress.pictures == 36
        assert recorder.checkpoints == [3, 6]

    def test_a_row_holds_the_means_over_targets_and_over_pictures(self):
        class Sized(Regression):
            """A batch of n pictures has n squared targets, a task loss of n, an accuracy of n / 10, and 2 n beside."""

            def run(self, batch: Sequence[Tensor], **_: Any) -> Output:
                size = float(len(batch[0]))
                return made_of(super().run(batch).embedding, 2 * size, part=3 * size)

            def num_targets(self, batch: Sequence[Tensor]) -> int:
                return len(batch[0]) ** 2

            def score(self, batch: Sequence[Tensor], output: Output, label_smoothing: float = 0.0) -> Score:
                size = torch.tensor(float(len(batch[0])))
                return Score(0 * output.embedding.sum() + size, size / 10, self.num_targets(batch))

        recorder = Recorder([0.25, 0.5])
        run_fit(recorder, sizes=(3, 1), model=Sized(), epochs=2, lr=0.5, warmup_fraction=0.0)
        row = recorder.rows[1]
        assert row["task_loss"] == pytest.approx(2.8)  # (9 * 3 + 1 * 1) / 10, not (3 * 3 + 1 * 1) / 4, not (3 + 1) / 2
        assert row["train_accuracy"] == pytest.approx(0.28)
        assert row["train_loss"] == pytest.approx(2.8 + 5)  # beside it (3 * 6 + 1 * 2) / 4
        assert row["router_z_loss"] == 7.5
        assert (row["epoch"], row["step"], row["val_accuracy"]) == (2, 4, 0.5)
        assert (row["peak_lr"], row["lr"]) == tuple(
            learning_rate(step, 4, TrainingConfig(lr=0.5, warmup_fraction=0.0)) for step in (2, 3)
        )
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        assert list(row)[:5] == ["epoch", "step", "lr", "train_loss", "train_accuracy"]

    @pytest.mark.parametrize(
        ("seconds", "at_step", "of_a_step"),
        [
            ([0.5, 0.2, 9.0], 2, 0.2),  # the first one warms up
            ([0.2, 0.5, 9.0], 2, 0.2),  # or the machine was interrupted in the second
            ([7.0, 6.0, 9.0], 1, 7.0),  # nobody is made to wait for another one
        ],
    )
    def test_estimates_the_time_that_is_left_once_after_a_step_or_two(self, monkeypatch, seconds, at_step, of_a_step):
        now, took = [0.0], itertools.chain(seconds, itertools.repeat(1.0))
        original = Trainee.step

        def step(*args: Any) -> Any:
            now[0] += next(took)
            return original(*args)

        monkeypatch.setattr(Trainee, "step", step)
        monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        recorder = Recorder()
        run_fit(recorder, sizes=(1,) * 15, epochs=3)
        assert recorder.estimates == [pytest.approx(of_a_step * (45 - at_step))]

    def test_where_nobody_has_a_terminal_lines_say_loss_rate_and_time_left(self, monkeypatch):
        monkeypatch.setattr(display, "LEAST_SECONDS", 0.0)
        monkeypatch.setattr(display, "PAUSE", 0.0)
        recorder = Recorder()
        run_fit(recorder, epochs=2)
        assert len(recorder.lines) == 6
        for number, line in enumerate(recorder.lines):
            at = f"epoch {number // 3 + 1}/2  step {number % 3 + 1}/3"
            assert re.fullmatch(rf"{at}  loss \d+\.\d{{3}}  accuracy 0\.0%  [\d,.]+ images/s  00:00:\d\d left", line)

    def test_a_loss_that_is_not_finite_is_one_line(self):
        with pytest.raises(UserError, match=r"the loss is (inf|nan) at step 3: lower --lr"):
            run_fit(Recorder(), model=Diverging(math.inf))

    def test_a_validation_loss_that_is_not_finite_is_one_line_and_nothing_is_saved(self):
        recorder = Recorder()
        recorder.validate = lambda: {"val_accuracy": 0.5, "val_loss": math.nan}
        with pytest.raises(UserError, match=r"the loss is nan at step 3: lower --lr"):
            run_fit(recorder)
        assert (recorder.checkpoints, recorder.rows) == ([], [])

    def test_weights_are_the_best_until_validated_and_where_validation_rose(self):
        assert Progress(window=2).is_best
        assert Progress(epoch=1, best=0.5).is_best
        assert not Progress(epoch=1, best=0.5, window=1).is_best
        assert not Progress(epoch=2, best=0.5, epochs_since_best=1).is_best

    def test_a_router_that_meets_what_is_not_a_number_is_one_line(self):
        class Routed(Regression):
            def run(self, batch: Sequence[Tensor], **_: Any) -> Output:
                raise FloatingPointError("the router's gates are not finite")

        recorder = Recorder()
        with pytest.raises(UserError, match=r"the loss is nan at step 0: lower --lr"):
            run_fit(recorder, model=Routed())
        assert recorder.checkpoints == []


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_step_is_finished_and_saved(self, monkeypatch, number):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        send_at(monkeypatch, Trainee, "step", [2], number)
        recorder = Recorder()
        with pytest.raises(StopRequested) as caught:
            run_fit(recorder, epochs=2)
        assert caught.value.signal_number == number
        assert str(caught.value) == number.name
        assert recorder.checkpoints == [2]
        assert recorder.rows == []
        assert handlers == {n: signal.getsignal(n) for n in handlers}

    def test_what_has_diverged_is_not_saved(self, monkeypatch):
        send_at(monkeypatch, Trainee, "step", [2], signal.SIGTERM)
        recorder = Recorder()
        with pytest.raises(UserError, match=r"the loss is nan at step 2: lower --lr"):
            run_fit(recorder, model=Diverging(math.nan))
        assert recorder.checkpoints == []

    def test_during_validation_the_epoch_is_finished_and_saved(self):
        recorder = Recorder(at_epoch_end=lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StopRequested):
            run_fit(recorder, epochs=2)
        assert (len(recorder.rows), recorder.best_after, recorder.checkpoints) == (1, [1], [3])

    def test_a_second_ctrl_c_does_not_wait(self, monkeypatch):
        send_at(monkeypatch, Trainee, "step", [2], signal.SIGINT, signal.SIGINT)
        recorder = Recorder()
        # Python's own handler: a shell starts what runs in its background with Ctrl-C ignored.
        former = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_fit(recorder)
        finally:
            signal.signal(signal.SIGINT, former)
        assert recorder.checkpoints == []

    def test_handlers_are_put_back_after_a_whole_run(self):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        run_fit(Recorder(), epochs=1)
        assert handlers == {n: signal.getsignal(n) for n in handlers}


class TestTimeLimit:
    """The schedule and the end follow the clock, a second a step here."""

    @staticmethod
    def train(monkeypatch: pytest.MonkeyPatch, **config: Any) -> tuple[Progress, list[float]]:
        now = iter(range(10_000))
        monkeypatch.setattr("diffmoe.training.loop.time", SimpleNamespace(perf_counter=lambda: float(next(now))))
        trainee, rates = make_trainee(Regression(), **config), []
        step = trainee.step

        def watch(window: Sequence[Any], rate: float) -> Any:
            rates.append(rate)
            return step(window, rate)

        monkeypatch.setattr(trainee, "step", watch)
        recorder = Recorder()
        return fit(trainee, ListBatches(2, 2, 2, 2), recorder.hooks(), Progress()), rates

    def test_it_ends_in_mid_epoch_and_the_rate_came_down_to_its_end(self, monkeypatch):
        fields: dict[str, Any] = {"lr": 1.0, "warmup_fraction": 0.0, "final_lr_fraction": 0.0, "epochs": 1000}
        progress, rates = self.train(monkeypatch, **fields, max_seconds=6.0)
        # An epoch's end reads the clock once more: 5 seconds for its 4 steps, and the sixth is the last.
        assert (progress.step, progress.epoch, progress.seconds) == (5, 2, 7.0)
        gone = [0, 1, 2, 3, 5]
        assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * seconds / 6)) for seconds in gone])
        assert progress.history[-1]["step"] == 5

    def test_steps_that_end_before_the_time_end_the_run(self, monkeypatch):
        progress, rates = self.train(monkeypatch, epochs=2, max_seconds=1000.0)
        assert (progress.step, progress.epoch) == (8, 2)
        config = TrainingConfig(epochs=2)
        assert rates == pytest.approx([learning_rate(step, 8, config) for step in range(8)])
