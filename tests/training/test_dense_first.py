"""Dense first, then split: a pool is one layer until then, its experts copies of it; a stopped run goes on alike."""

from __future__ import annotations

import copy
import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from tests.small import SMALL
from tests.training.signals import send_at
from torch import Tensor

from diffmoe.config import TrainingConfig
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts
from diffmoe.storage.model_files import load_model
from diffmoe.training.objective import Trainee

CONFIG = dataclasses.replace(SMALL, num_general_experts=4)


def pool(**options: Any) -> GeneralExperts:
    made = GeneralExperts(16, 4, **{"top_k": 2, "expansion_factor": 2, **options}).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def experts_of(model: ImageClassifier) -> list[Tensor]:
    """The image tower's: without descriptions of classes nothing else learns."""
    pools = [module for module in model.backbone.image_encoder.modules() if isinstance(module, GeneralExperts)]
    return [stack for one in pools for stack in one.weights]


def are_alike(model: ImageClassifier) -> bool:
    return all(torch.equal(stack, stack[:1].expand_as(stack)) for stack in experts_of(model))


@pytest.mark.parametrize("router", ["attentive", "picture", "expert_choice", "hash"])
@pytest.mark.parametrize(("top_k", "gate_scale"), [(1, 1.0), (2, 2.0), (4, 0.5)])
def test_whole_it_computes_what_experts_that_are_alike_do(router: str, top_k: int, gate_scale: float) -> None:
    """And each gets the same gradient, together that of all; padding comes out as zeros."""
    one = pool(router=router, top_k=top_k, gate_scale=gate_scale)
    one.make_alike()
    apart = copy.deepcopy(one)
    one.is_whole = True
    x = torch.randn(3, 8, 16, dtype=torch.float64)
    mask = torch.ones(3, 8)
    mask[1, 5:] = 0
    outputs = [each(x, mask)[0] for each in (one, apart)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)
    assert not outputs[0][1, 5:].any()
    for output in outputs:
        output.square().sum().backward()
    for whole, of_each in zip(one.weights, apart.weights, strict=True):
        assert whole.grad is not None
        assert of_each.grad is not None
        assert torch.equal(whole.grad, whole.grad[:1].expand_as(whole.grad))
        torch.testing.assert_close(whole.grad.sum(0), of_each.grad.sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_are_copies_until_the_split_and_differ_after_it(optimizer: Any) -> None:
    torch.manual_seed(0)
    model = ImageClassifier(CONFIG)
    assert not are_alike(model)
    config = TrainingConfig(dense_fraction=0.5, optimizer=optimizer, ema_decay=0.9)
    trainee = Trainee(Fabric(accelerator="cpu", devices=1), model, config)
    averages = trainee.evaluated
    assert isinstance(averages, ImageClassifier)
    start = [stack.clone() for stack in experts_of(model)]
    batch = torch.randn(6, 1, 8, 8), torch.randint(3, (6,))
    for whole in (True, False):
        trainee.make_whole(whole)
        for _ in range(3):
            trainee.step([batch], 0.01)
        assert are_alike(model) is are_alike(averages) is whole
    assert not any(torch.equal(stack, before) for stack, before in zip(experts_of(model), start, strict=True))


def test_without_it_experts_start_apart() -> None:
    model = ImageClassifier(CONFIG)
    Trainee(Fabric(accelerator="cpu", devices=1), model, TrainingConfig())
    assert not are_alike(model)


class TestRun:
    """3 epochs of 5 steps, the first 8 of them whole."""

    FLAGS = ("--epochs", "3", "--batch_size", "64", "--dense_fraction", "0.5")

    def test_splits_at_its_step(self, cli: Any, tiny_flags: list[str], tmp_path: Path, monkeypatch: Any) -> None:
        told: list[bool] = []
        make_whole = Trainee.make_whole
        monkeypatch.setattr(Trainee, "make_whole", lambda self, whole: (told.append(whole), make_whole(self, whole)))
        assert cli("train", *tiny_flags, *self.FLAGS, "--save_dir", tmp_path).code == 0
        assert told == [True] * 8 + [False] * 7

    @pytest.mark.parametrize("step", [3, 8, 9])
    def test_stopped_it_ends_with_the_same_weights(
        self, cli: Any, tiny_flags: list[str], tmp_path: Path, monkeypatch: Any, step: int
    ) -> None:
        flags = ["train", *tiny_flags, *self.FLAGS]
        assert cli(*flags, "--save_dir", tmp_path / "a").code == 0
        with monkeypatch.context() as patch:
            send_at(patch, Trainee, "step", [step], signal.SIGTERM)
            assert cli(*flags, "--save_dir", tmp_path / "b").code == 143
        assert cli(*flags, "--save_dir", tmp_path / "b", "--resume").code == 0
        a, b = (load_model(tmp_path / name / "digits_model.pth").state_dict() for name in "ab")
        assert all(torch.equal(value, b[name]) for name, value in a.items())

    @pytest.mark.parametrize(
        ("more", "told"),
        [
            (("--router", "soft"), "router 'soft' has no experts apart; give 0 or one of attentive"),
            (("--init", "x.pth"), "with init the experts start from what it has, not as one layer; give 0"),
            (("--dense_fraction", "1"), "must be from 0 up to, but not including, 1"),
        ],
    )
    def test_mistakes_are_one_line(
        self, cli: Any, tiny_flags: list[str], tmp_path: Path, more: tuple[str, ...], told: str
    ) -> None:
        result = cli("train", *tiny_flags, *self.FLAGS, "--save_dir", tmp_path / "runs", *more)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert told in result.err
        assert not (tmp_path / "runs").exists()
