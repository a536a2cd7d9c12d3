"""Averaged weights by hand: how much of them stays, what is averaged, and that they are what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from tests.training.trainees import ListBatches, Regression, make_trainee
from torch import nn

from diffmoe.config import ModelConfig
from diffmoe.model.heads import ImageClassifier
from diffmoe.training.averages import Averages


class Counting(Regression):
    """With the statistics that BatchNorm has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)


def set_all(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def test_the_first_steps_are_forgotten_sooner() -> None:
    model = Counting()
    set_all(model, 1)
    averages = Averages(model, 0.25)
    # t = 0: 1/10 stays; t = 1: 2/11; t = 2: 3/12 = 0.25; from then on 0.25.
    expected = 1.0
    for value, stays in ((3, 0.1), (5, 2 / 11), (2, 0.25), (8, 0.25)):
        set_all(model, value)
        averages.update(model)
        expected = stays * expected + (1 - stays) * value
        for name, tensor in averages.model.state_dict().items():
            wanted = value if name == "norm.num_batches_tracked" else expected
            assert tensor.double().mean().item() == pytest.approx(wanted), name
    assert averages.steps == 4


def test_the_model_is_not_changed_and_no_average_is_trained() -> None:
    model = Counting()
    averages = Averages(model, 0.9)
    before = copy.deepcopy(model.state_dict())
    set_all(averages.model, 7)
    averages.update(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in averages.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_step_moves_them_once_after_the_optimizer() -> None:
    trainee = make_trainee(Regression(), ema_decay=0.9, accumulation_steps=2)
    assert trainee.averages is not None
    before = [parameter.clone() for parameter in trainee.evaluated.parameters()]
    trainee.step(ListBatches(4, 4).batches, 0.1)
    pairs = zip(before, trainee.model.parameters(), trainee.evaluated.parameters(), strict=True)
    for former, now, average in pairs:
        torch.testing.assert_close(average, 0.1 * former + 0.9 * now)
    assert trainee.averages.steps == 1


def test_without_them_the_model_itself_is_kept() -> None:
    trainee = make_trainee(Regression())
    assert trainee.averages is None
    assert trainee.evaluated is trainee.model


def test_forward_moves_none() -> None:
    config = ModelConfig(
        **{"img_size": 8, "patch_size": 2, "patch_embed": "conv", "embed_dim": 16, "num_heads": 2, "num_classes": 3},
        **{"img_encoder_layers": 1, "text_encoder_layers": 1, "fusion_layers": 0, "vocab_size": 8, "dropout": 0.0},
    )
    trainee = make_trainee(ImageClassifier(config), Fabric(accelerator="cpu", devices=1), ema_decay=0.9)
    before = copy.deepcopy(trainee.evaluated.state_dict())
    trainee.objective(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert all(torch.equal(value, before[name]) for name, value in trainee.evaluated.state_dict().items())


def test_what_a_run_keeps_and_validates_are_the_averages(cli: Any, tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--epochs", 2, "--lr", 0.003, "--patch_embed", "conv", "--ema_decay", 0.8]
    assert cli("train", *flags, "--save_dir", tmp_path).code == 0
    last = torch.load(tmp_path / "digits" / "last.ckpt", weights_only=True)
    kept = torch.load(tmp_path / "digits_model.pth", weights_only=True)["state_dict"]
    assert last["averages"]["steps"] == 10
    assert last["progress"]["epochs_since_best"] == 0  # the second epoch is the best
    assert all(torch.equal(value, last["averages"]["model"][name]) for name, value in kept.items())
    differ = {name for name, value in kept.items() if not torch.equal(value, last["model"][name])}
    assert {"head.weight", "backbone.patch_embed.projection.0.1.running_mean"} <= differ
    validated = last["progress"]["history"][-1]["val_accuracy"]
    assert cli("test", "--save_dir", tmp_path, "--output_dir", tmp_path).code == 0
    assert last["progress"]["best"] == validated


@pytest.mark.parametrize("damage", [{"steps": -1}, {"steps": "two"}, {"model": {}}])
def test_damaged_averages_are_one_line(cli: Any, tiny_flags: list[str], tmp_path: Path, damage: dict[str, Any]) -> None:
    flags = [*tiny_flags, "--epochs", 1, "--ema_decay", 0.8, "--save_dir", tmp_path]
    assert cli("train", *flags).code == 0
    path = tmp_path / "digits" / "last.ckpt"
    states = torch.load(path, weights_only=True)
    torch.save({**states, "averages": {**states["averages"], **damage}}, path)
    result = cli("train", *flags, "--resume")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"diffmoe: error: checkpoint {path} is damaged (")
