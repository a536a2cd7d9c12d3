"""The loop: its schedule and optimizer by hand, exact accumulation, exact resume, signals."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from diffmoe import training
from diffmoe.commands import training as command
from diffmoe.config import ModelConfig, TrainingConfig, UserError
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.objectives import AUXILIARY, CaptionObjective, ClassificationObjective
from diffmoe.runs import EpochWriter
from diffmoe.training import Hooks, Progress, StopRequested, fit, learning_rate, make_optimizer, train_step


class TestLearningRate:
    CONFIG = TrainingConfig(lr=1.0, warmup_fraction=0.1, final_lr_fraction=0.2)

    @pytest.mark.parametrize(
        ("step", "rate"),
        [
            (0, 0.1),  # 10 of 100 steps warm up: 1/10 of the peak
            (4, 0.5),
            (9, 1.0),  # the peak
            (10, 1.0),  # the cosine begins there
            (55, 0.6),  # half way down (45 of 90): 0.2 + 0.8 * (1 + cos 90°) / 2
            (40, 0.8),  # a third (30 of 90): 0.2 + 0.8 * (1 + cos 60°) / 2
            (100, 0.2),  # the end
        ],
    )
    def test_hand_derived(self, step, rate):
        assert learning_rate(step, 100, self.CONFIG) == pytest.approx(rate, abs=1e-12)

    def test_without_warmup_it_starts_at_the_peak(self):
        config = TrainingConfig(lr=0.5, warmup_fraction=0.0, final_lr_fraction=0.0)
        assert [learning_rate(step, 2, config) for step in (0, 1, 2)] == pytest.approx([0.5, 0.25, 0.0])

    def test_one_step_is_at_the_peak(self):
        assert learning_rate(0, 1, self.CONFIG) == 1.0

    def test_rises_then_falls_and_never_leaves_its_bounds(self):
        rates = [learning_rate(step, 37, self.CONFIG) for step in range(37)]
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert min(rates) > 0
        assert max(rates) == 1.0


DECAYED = (
    *(r"patch_embed\.projection\.\d+\.0\.weight", r"(token|image|text)_projection\.weight", r"head\.weight"),
    *(r"\.attention\.(query|key_value|out)\.weight", r"cross_attention\.(query|key_value|out)\.weight"),
    *(r"(global|modality)_expert\.fc[12]\.weight", r"general_experts\.fc[12]_weight"),
    r"general_experts\.router\.(keys|query\.weight|noise\.weight)",
)
"""The matrices of a model, by the end of their names; all else is a bias, a norm, an embedding or a position."""


def test_weight_decay_is_on_matrices_only():
    config = ModelConfig(
        img_size=8,
        patch_size=2,
        patch_embed="conv",
        embed_dim=16,
        num_heads=2,
        img_encoder_layers=1,
        text_encoder_layers=1,
        fusion_layers=1,
        vocab_size=20,
        text_embed_dim=4,
        router_noise=True,
        classify_with="descriptions",
    )
    model = ImageClassifier(config, torch.ones(10, 1, 6, dtype=torch.int64))
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)  # each once
    assert decay.keys() == {id(parameter) for parameter in model.parameters()}
    found = {name for name, parameter in model.named_parameters() if decay[id(parameter)] == 0.3}
    matrices = re.compile(f"({'|'.join(DECAYED)})$")
    assert found == {name for name, _ in model.named_parameters() if matrices.search(name)}
    assert all(any(re.search(f"{end}$", name) for name in found) for end in DECAYED)
    assert set(decay.values()) == {0.3, 0.0}


class FixedModel(nn.Module):
    """Says the same of every batch."""

    def __init__(self, **out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.out


def test_objective_is_smoothed_cross_entropy_plus_the_routers_loss():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]]).log()
    parts = {name: torch.tensor(2.0) for name in AUXILIARY}
    model = FixedModel(logits=logits, router_loss=torch.tensor(0.5), **parts)
    loss, metrics = ClassificationObjective(model, label_smoothing=0.3)(torch.zeros(2, 1), torch.tensor([0, 0]))
    # Targets: 0.7 + 0.3 / 3 = 0.8 on the label, 0.1 on each other class.
    first = -(0.8 * math.log(0.7) + 0.1 * math.log(0.2) + 0.1 * math.log(0.1))
    second = -(0.8 * math.log(0.2) + 0.1 * math.log(0.7) + 0.1 * math.log(0.1))
    assert metrics["task_loss"].item() == pytest.approx((first + second) / 2, abs=1e-6)
    assert loss.item() == pytest.approx((first + second) / 2 + 0.5, abs=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics.keys() == {"loss", "task_loss", "accuracy", *AUXILIARY}


class Regression(nn.Module):
    """Least squares in float64: no BatchNorm, so a batch's gradient is the mean of its pictures'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.layers(x) - y).square().mean()
        return loss, {"loss": loss}


def setup(objective: nn.Module, lr: float = 0.1) -> tuple[Fabric, Any, Any]:
    """Plain SGD: Adam would hide a gradient of the wrong size."""
    fabric = Fabric(accelerator="cpu", devices=1)  # leaves float64 as it is; its "64-true" rounds the loss
    return fabric, *fabric.setup(objective, torch.optim.SGD(objective.parameters(), lr=lr))


class TestTrainStep:
    BATCHES = tuple((torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in (5, 5, 2))
    TOGETHER = tuple(torch.cat(parts) for parts in zip(*BATCHES, strict=True))

    def step(self, window: list[Any], rate: float, clip_norm: float) -> tuple[Tensor, dict[str, Tensor]]:
        objective = Regression()
        before = nn.utils.parameters_to_vector(objective.parameters()).detach().clone()
        sums = train_step(*setup(objective), window, rate, clip_norm)
        assert all(parameter.grad is None for parameter in objective.parameters())
        return nn.utils.parameters_to_vector(objective.parameters()).detach() - before, sums

    @pytest.mark.parametrize("clip_norm", [0.0, 0.01])
    def test_a_ragged_window_is_one_big_batch(self, clip_norm):
        in_parts, sums = self.step(list(self.BATCHES), 0.1, clip_norm)
        at_once, expected = self.step([self.TOGETHER], 0.1, clip_norm)
        assert at_once.norm() > 0
        torch.testing.assert_close(in_parts, at_once, rtol=0, atol=1e-12)
        assert sums["pictures"] == expected["pictures"] == 12
        torch.testing.assert_close(sums["loss"], expected["loss"], rtol=0, atol=1e-12)

    def test_the_step_is_the_rate_times_the_clipped_norm(self):
        moved, _ = self.step(list(self.BATCHES), 0.3, 0.01)
        assert moved.norm().item() == pytest.approx(0.3 * 0.01, rel=1e-3)  # the gradient is longer than 0.01
        free, _ = self.step(list(self.BATCHES), 0.3, 1e6)
        unclipped, _ = self.step(list(self.BATCHES), 0.3, 0)
        assert torch.equal(free, unclipped)


class ListBatches:
    """Batches as `fit` reads them."""

    def __init__(self, *sizes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [(torch.randn(n, 3, generator=generator).double(), torch.zeros(n, 2).double()) for n in sizes]

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        return iter(self.batches[start:])


class Recorder:
    """Hooks that write down when they were called; validation scores come from a list."""

    def __init__(self, scores: list[float] | None = None, at_epoch_end: Callable[[], None] = lambda: None) -> None:
        self.scores, self.at_epoch_end = iter(scores or [0.5] * 1000), at_epoch_end
        self.best_after: list[int] = []
        self.checkpoints: list[int] = []
        self.rows: list[dict[str, float]] = []
        self.estimates: list[float] = []

    def validate(self) -> dict[str, float]:
        self.at_epoch_end()
        return {"val_accuracy": next(self.scores)}

    def hooks(self) -> Hooks:
        return Hooks(
            validate=self.validate,
            on_epoch=self.end_epoch,
            on_stop=lambda progress: self.checkpoints.append(progress.step),
            on_estimate=self.estimates.append,
        )

    def end_epoch(self, progress: Progress) -> None:
        self.rows.append(progress.history[-1])
        self.checkpoints.append(progress.step)
        if progress.is_best:
            self.best_after.append(progress.epoch)


def run_fit(
    recorder: Recorder, sizes: tuple[int, ...] = (4, 4, 2), objective: nn.Module | None = None, **config: Any
) -> Progress:
    parts = setup(objective or Regression())
    return fit(*parts, ListBatches(*sizes), recorder.hooks(), TrainingConfig(**config), Progress())


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

    def test_a_row_holds_the_means_over_pictures(self):
        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

            def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                size = torch.tensor(float(len(x)))
                return self.weight.sum(), {"loss": size, "accuracy": size / 10, "task_loss": 2 * size}

        recorder = Recorder([0.25, 0.5])
        run_fit(recorder, sizes=(3, 1), objective=Mean(), epochs=2, lr=0.5, warmup_fraction=0.0)
        row = recorder.rows[1]
        assert row["train_loss"] == 2.5  # (3 * 3 + 1 * 1) / 4, not (3 + 1) / 2
        assert (row["train_accuracy"], row["task_loss"]) == (pytest.approx(0.25), 5)
        assert (row["epoch"], row["step"], row["val_accuracy"]) == (2, 4, 0.5)
        assert row["lr"] == learning_rate(3, 4, TrainingConfig(lr=0.5, warmup_fraction=0.0))
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        assert list(row)[:5] == ["epoch", "step", "lr", "train_loss", "train_accuracy"]

    def test_estimates_the_time_once_after_20_steps(self):
        recorder = Recorder()
        run_fit(recorder, sizes=(1,) * 15, epochs=3)
        assert len(recorder.estimates) == 1

    def test_a_loss_that_is_not_finite_is_one_line(self):
        class Broken(Regression):
            def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                loss, _ = super().forward(x, y)
                return loss * math.inf, {"loss": loss * math.inf}

        with pytest.raises(UserError, match=r"the loss is (inf|nan) at step 3: lower --lr"):
            run_fit(Recorder(), objective=Broken())

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

    def test_progress_means_are_over_pictures(self):
        progress = Progress(sums={"pictures": torch.tensor(4.0), "loss": torch.tensor(10.0)})
        assert progress.means() == {"loss": 2.5}


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_step_is_finished_and_saved(self, monkeypatch, number):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        send_at(monkeypatch, training, "train_step", [2], number)
        recorder = Recorder()
        with pytest.raises(StopRequested) as caught:
            run_fit(recorder, epochs=2)
        assert caught.value.signal_number == number
        assert str(caught.value) == number.name
        assert recorder.checkpoints == [2]
        assert recorder.rows == []
        assert handlers == {n: signal.getsignal(n) for n in handlers}

    def test_what_has_diverged_is_not_saved(self, monkeypatch):
        class Broken(Regression):
            def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                loss, _ = super().forward(x, y)
                return loss, {"loss": loss * math.nan}

        send_at(monkeypatch, training, "train_step", [2], signal.SIGTERM)
        recorder = Recorder()
        with pytest.raises(UserError, match=r"the loss is nan at step 2: lower --lr"):
            run_fit(recorder, objective=Broken())
        assert recorder.checkpoints == []

    def test_during_validation_the_epoch_is_finished_and_saved(self):
        recorder = Recorder(at_epoch_end=lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StopRequested):
            run_fit(recorder, epochs=2)
        assert (len(recorder.rows), recorder.best_after, recorder.checkpoints) == (1, [1], [3])

    def test_a_second_ctrl_c_does_not_wait(self, monkeypatch):
        send_at(monkeypatch, training, "train_step", [2], signal.SIGINT, signal.SIGINT)
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


def send_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: list[int], *signals: int) -> None:
    """Send this process the signals while `module.name` is called for the `calls`-th time, counted from 1."""
    original, count = getattr(module, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        for number in signals if count in calls else ():
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)


def test_the_caption_objective_is_the_next_tokens_loss_plus_the_weighted_auxiliary_losses() -> None:
    config = ModelConfig(
        **{"img_size": 8, "embed_dim": 16, "num_heads": 2, "text_embed_dim": 8, "vocab_size": 20, "max_text_len": 6},
        **{"img_encoder_layers": 1, "text_encoder_layers": 1, "fusion_layers": 1, "dropout": 0.0},
        use_gradient_checkpointing=False,
    )
    torch.manual_seed(0)
    model = Captioner(config)
    images, tokens = torch.randn(2, 1, 8, 8), torch.tensor([[5, 6, 7, 8], [5, 9, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    loss, metrics = CaptionObjective(model, label_smoothing=0.2)(images, tokens, mask)
    out = model(images, tokens, mask)
    real = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]  # position t predicts token t + 1; the last of row 1 is padding
    logits = torch.stack([out["logits"][row, t] for row, t in real])
    targets = torch.tensor([tokens[row, t + 1] for row, t in real])
    task = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2)
    torch.testing.assert_close(metrics["task_loss"], task)
    torch.testing.assert_close(loss, task + out["router_loss"])
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(-1) == targets).float().mean().item())


class Crash(Exception):  # noqa: N818 - the power fails
    """Nobody catches it: what is on disk is all that is left."""


def crash_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Die as `owner.name` is called for the `call`-th time."""
    original, count = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


ALL_RANDOMNESS = [
    *("--epochs", "3", "--lr", "0.003", "--batch_size", "64", "--accumulation_steps", "2", "--dropout", "0.1"),
    *("--top_k", "2", "--router_noise", "--crop_padding", "1", "--flip", "--erase", "0.3"),
]
"""269 pictures: 5 batches, 3 optimizer steps an epoch (the last one of a single ragged batch), 9 in all."""

TIMES = ("seconds", "images_per_second", "train_seconds")


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """The run that nobody interrupted."""
    from diffmoe.cli import main

    save_dir = tmp_path_factory.mktemp("in_one_go")
    assert main(["train", *tiny_flags, *ALL_RANDOMNESS, "--save_dir", str(save_dir)]) == 0
    return save_dir


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list | tuple) else value


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, whatever is nested in what."""
    assert type(found) is type(expected), where
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}[{number}]")
    else:
        assert found == expected, where


def assert_same_run(found: Path, expected: Path) -> None:
    """Final weights, optimizer, generators, progress, best model, history and metrics are equal, times apart."""
    for name in ("digits/last.ckpt", "digits_model.pth"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (found, expected))
        assert_equal(without_times(one), without_times(other), name)
    histories = [(folder / "digits/history.csv").read_text().splitlines() for folder in (found, expected)]
    assert_equal(*(without_times(list(csv.DictReader(lines))) for lines in histories))
    metrics = [json.loads((folder / "digits/metrics.json").read_text()) for folder in (found, expected)]
    assert_equal(*(without_times(values) for values in metrics))


class TestExactResume:
    """Stopping anywhere and resuming ends where never stopping does."""

    @pytest.mark.parametrize(
        ("module", "name", "calls"),
        [
            (training, "train_step", [1]),
            (training, "train_step", [3]),  # the last of an epoch, before its validation
            (training, "train_step", [5]),  # in mid-epoch
            (training, "train_step", [2, 6, 7]),  # again and again; 7 is the first of the last epoch
            (training, "train_step", [9]),  # the very last
            (command, "_validate", [2]),
        ],
        ids=lambda value: str(value) if isinstance(value, list) else getattr(value, "__name__", value),
    )
    def test_after_a_signal(self, monkeypatch, cli, tiny_flags, in_one_go, tmp_path, module, name, calls):
        send_at(monkeypatch, module, name, calls, signal.SIGTERM)
        flags = [*tiny_flags, *ALL_RANDOMNESS, "--save_dir", tmp_path]
        results = [cli("train", *flags)] + [cli("train", *flags, "--resume") for _ in calls]
        assert [result.code for result in results] == [143] * len(calls) + [0]
        last = tmp_path / "digits" / "last.ckpt"
        assert results[0].err == f"stopped by SIGTERM, saved in {last}: the same command with --resume goes on\n"
        assert_same_run(tmp_path, in_one_go)

    @pytest.mark.parametrize(
        ("owner", "name", "call"),
        [
            (command, "_validate", 3),
            (command, "save_run", 2),
            (command, "save_run", 3),
            (EpochWriter, "write", 1),  # saved and not told of
            (EpochWriter, "write", 3),  # nothing is left to train
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_after_a_crash(self, monkeypatch, cli, tiny_flags, in_one_go, tmp_path, owner, name, call):
        flags = [*tiny_flags, *ALL_RANDOMNESS, "--save_dir", tmp_path]
        with monkeypatch.context() as patch:
            crash_at(patch, owner, name, call)
            with pytest.raises(Crash):
                cli("train", *flags)
        assert cli("train", *flags, "--resume").code == 0
        assert_same_run(tmp_path, in_one_go)

    def test_of_a_finished_run_changes_nothing(self, cli, own_run):
        files = ["digits_model.pth", "digits/last.ckpt", "digits/metrics.json", "digits/history.csv"]
        before = {name: (own_run.save_dir / name).read_bytes() for name in files}
        assert cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume").code == 0
        assert before == {name: (own_run.save_dir / name).read_bytes() for name in files}

    @pytest.mark.parametrize(
        ("name", "value"),
        [("lr", 0.007), ("epochs", 5), ("batch_size", 32), ("embed_dim", 32), ("val_fraction", 0.4), ("seed", 3)],
    )
    def test_with_other_settings_is_refused(self, cli, own_run, snapshot, name, value):
        before = snapshot(own_run.save_dir)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume", f"--{name}", value)
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        assert f"resume: {name} is {value!r} but was " in result.err
        assert snapshot(own_run.save_dir) == before

    def test_where_there_is_nothing_to_resume(self, cli, tiny_flags, tmp_path):
        result = cli("train", *tiny_flags, "--save_dir", tmp_path / "none", "--resume")
        assert result.code == 2
        assert result.err.startswith("diffmoe: error: resume: there is no ")
        assert not (tmp_path / "none").exists()
