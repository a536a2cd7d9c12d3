"""A script that two processes run: what each of them finds goes into files of its own.

two_ranks.py FOLDER [flags of train]
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from tests.training.trainees import ListBatches, Regression, made_of, make_trainee
from torch import Tensor, nn

from diffmoe.config import ModelConfig, RunConfig, UserError
from diffmoe.config.settings import parse_settings
from diffmoe.model.heads import ImageClassifier, Score
from diffmoe.model.outputs import Output
from diffmoe.runs import train_run
from diffmoe.training import saving
from diffmoe.training.loop import Hooks, Progress, StopRequested, fit
from diffmoe.training.objective import Trainee
from diffmoe.training.parallel import any_of, make_fabric, share_buffers, total, whole_state


def run(
    fabric: Fabric, model: Regression, validation: Sequence[dict[str, float]] = ({"val_accuracy": 0.5},), **config: Any
) -> dict[str, Any]:
    """What comes of training a rank's model on three batches an epoch, validated so: the last row counts on."""
    saved: list[int] = []
    progress = Progress()

    def validate() -> dict[str, float]:
        return validation[min(progress.epoch, len(validation) - 1)]

    hooks = Hooks(validate, lambda progress: saved.append(progress.step), *[lambda _: None] * 3)
    trainee = make_trainee(model, fabric, **config)
    batches = ListBatches(4, 4, 2, seed=fabric.global_rank)
    try:
        fit(trainee, batches, hooks, progress)
        ended = "end"
    except (UserError, StopRequested) as error:
        ended = f"{type(error).__name__}: {error}"
    found = {name: getattr(progress, name) for name in ("epoch", "step", "best", "epochs_since_best")}
    return found | {"ended": ended, "saved": saved, "scores": [row["val_accuracy"] for row in progress.history]}


class DivergesOnTheSecond(Regression):
    """From its second step on, on the second rank, the task's loss (or the model's own) is no number."""

    def __init__(self, rank: int, own: bool = False) -> None:
        super().__init__()
        self.rank, self.own, self.steps = rank, own, 0

    def run(self, batch: Sequence[Tensor], **_: Any) -> Output:
        self.steps += 1
        embedding = super().run(batch).embedding
        return made_of(embedding, math.nan * embedding.sum() if self.own and self.diverges() else 0.0)

    def score(self, batch: Sequence[Tensor], output: Output, label_smoothing: float = 0.0) -> Score:
        found = super().score(batch, output)
        return found._replace(loss=found.loss * math.nan) if not self.own and self.diverges() else found

    def diverges(self) -> bool:
        return self.rank == 1 and self.steps >= 2


class ToldToStop(Regression):
    """The second rank gets a signal in its second step."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.steps = rank, 0

    def run(self, batch: Sequence[Tensor], **_: Any) -> Output:
        self.steps += 1
        if self.rank == 1 and self.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().run(batch)


def validation_differs(fabric: Fabric) -> dict[str, Any]:
    by_rank = ([0.5, 0.6, 0.6, 0.55, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5])
    return run(
        fabric,
        Regression(),
        [{"val_accuracy": score} for score in by_rank[fabric.global_rank]],
        epochs=5,
        patience=2,
    )


def validation_is_no_number(fabric: Fabric) -> dict[str, Any]:
    loss = math.nan if fabric.global_rank == 0 else 1.0
    return run(fabric, Regression(), [{"val_accuracy": 0.5, "val_loss": loss}])


def windows(fabric: Fabric) -> dict[str, Any]:
    """A step on both ranks' ragged windows, beside the step on one batch of them all."""
    by_rank = [ListBatches(*sizes, seed=seed).batches for seed, sizes in enumerate(((5, 2), (3, 1)))]
    stepped, alone = Regression(), Regression()
    make_trainee(stepped, fabric).step(by_rank[fabric.global_rank], 0.1)
    x, y = (torch.cat(parts) for parts in zip(*by_rank[0], *by_rank[1], strict=True))
    (alone.layers(x) - y).square().mean().backward()
    pairs = zip(stepped.parameters(), alone.parameters(), strict=True)
    off = [float((p - (q - 0.1 * q.grad)).abs().max()) for p, q in pairs if q.grad is not None]
    return {"off": max(off), "moved": max(float(q.grad.abs().max()) for q in alone.parameters() if q.grad is not None)}


def balance(fabric: Fabric) -> dict[str, Any]:
    """The biases after a step on other pictures on each rank, beside those that the load of both asks for."""
    config = ModelConfig(
        **{"img_size": 8, "embed_dim": 16, "num_heads": 2, "img_encoder_layers": 1, "fusion_layers": 0},
        **{"dropout": 0.0, "num_classes": 3, "balance_bias_rate": 0.01},
    )
    torch.manual_seed(0)
    model = ImageClassifier(dataclasses.replace(config, vocab_size=8, text_encoder_layers=1))
    for name, parameter in model.named_parameters():  # what only texts would train; DDP asks that all be used
        parameter.requires_grad_(name.startswith(("head", "backbone.image_", "backbone.patch_")))
    model.backbone.image_projection.requires_grad_(False)
    generator = torch.Generator().manual_seed(fabric.global_rank)
    batch = (torch.randn(6, 1, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator))
    trainee = make_trainee(model, fabric)
    load = trainee.objective(*batch).loads["image_0"]
    trainee.step([batch], 0.1)
    of_both = total(fabric, load).float()
    bias = model.backbone.routers()["image_0"].balance_bias
    expected = 0.01 * (of_both.mean() - of_both).sign()
    return {"bias": bias.tolist(), "expected": expected.tolist(), "load": load.tolist()}


def helpers(fabric: Fabric) -> dict[str, Any]:
    rank = fabric.global_rank
    model = nn.BatchNorm1d(2)
    model.running_mean = torch.full((2,), float(rank + 1))
    state = whole_state(fabric, model)
    share_buffers(fabric, model)
    return {
        "any": any_of(fabric, rank == 1, False, True),
        "sum": total(fabric, torch.tensor([1.0, rank])).tolist(),
        "mean": total(fabric, torch.tensor([1.0, rank]), mean=True).tolist(),
        "buffers": model.running_mean.tolist(),
        "state": sorted(state),
    }


CASES: dict[str, Callable[[Fabric], dict[str, Any]]] = {
    "task loss": lambda fabric: run(fabric, DivergesOnTheSecond(fabric.global_rank)),
    "own loss": lambda fabric: run(fabric, DivergesOnTheSecond(fabric.global_rank, own=True)),
    "validation differs": validation_differs,
    "validation is no number": validation_is_no_number,
    "signal": lambda fabric: run(fabric, ToldToStop(fabric.global_rank)),
    "windows": windows,
    "balance": balance,
    "helpers": helpers,
}


def train(folder: Path, flags: list[str]) -> None:
    """A whole run on both; what each of them had as an epoch was saved is in `rank<number>.pt`."""
    save_run = saving.save_run

    def spy(path: Path, trainee: Trainee, progress: Progress, *others: Any) -> None:
        validation = [(row["val_loss"], row["val_accuracy"]) for row in progress.history]
        states = (trainee.model.state_dict(), trainee.evaluated.state_dict())
        weights = {f"{number}.{name}": value for number, state in enumerate(states) for name, value in state.items()}
        found = {"model": weights, "step": progress.step, "validation": validation}
        torch.save(found, folder / f"rank{trainee.fabric.global_rank}.pt")
        save_run(path, trainee, progress, *others)

    saving.save_run = spy
    train_run(parse_settings([*flags, "--num_devices", "2", "--save_dir", str(folder)], mode="train"))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    train(where, sys.argv[2:])
    launched = make_fabric(RunConfig(device="cpu", num_devices=2, precision="32-true"))  # or it would round float64
    told = {name: case(launched) for name, case in CASES.items()}
    (where / f"rank{launched.global_rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
