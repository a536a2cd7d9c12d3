"""Dense first, then split: pools are whole for a share of training, and their experts copies of one until then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe.config import TrainingConfig
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts
from diffmoe.storage.model_files import load_model
from diffmoe.training.loop import is_whole
from diffmoe.training.objective import Trainee


@pytest.mark.parametrize(("fraction", "steps"), [(0.0, 0), (0.3, 3), (0.35, 4), (0.99, 10), (0.01, 1)])
def test_a_step_is_whole_before_the_share_is_over(fraction: float, steps: int) -> None:
    config = TrainingConfig(dense_fraction=fraction)
    assert [is_whole(step, 10, config) for step in range(11)] == [step < steps for step in range(11)]


def experts_of(model: torch.nn.Module) -> list[GeneralExperts]:
    return [module for module in model.modules() if isinstance(module, GeneralExperts)]


@pytest.mark.parametrize(
    "more", [[], ["--ema_decay", "0.9", "--optimizer", "muon"]], ids=["adamw", "muon and averages"]
)
def test_a_run_splits_at_its_step_and_experts_part_after_it(
    cli: Any, tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    seen: list[tuple[bool, bool]] = []
    step = Trainee.step

    def look(self: Trainee, *given: Any) -> Any:
        sums = step(self, *given)
        assert len({pool.whole for pool in self.pools}) == 1
        seen.append((self.pools[0].whole, experts_of(self.evaluated)[0].is_alike))
        return sums

    monkeypatch.setattr(Trainee, "step", look)
    flags = [*tiny_flags, "--epochs", 2, "--dense_fraction", 0.3, "--batch_size", 64, "--save_dir", tmp_path, *more]
    assert cli("train", *flags).code == 0
    assert seen == [(True, True)] * 3 + [(False, False)] * 7


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_model_of_whole_pools_predicts_the_same_when_it_is_loaded(
    cli: Any, tiny_flags: list[str], tmp_path: Path, top_k: int
) -> None:
    flags = [*tiny_flags, "--epochs", 1, "--dense_fraction", 0.999, "--top_k", top_k, "--save_dir", tmp_path]
    assert cli("train", *flags).code == 0
    model, images, logits = load_model(tmp_path / "digits_model.pth"), torch.randn(9, 1, 8, 8), []
    assert isinstance(model, ImageClassifier)
    for whole in (False, True):
        for pool in experts_of(model):
            assert pool.is_alike
            assert pool.whole is False
            pool.whole = whole
        with torch.no_grad():
            logits.append(model.classify(images).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_experts_that_init_made_unlike_cannot_be_one(
    cli: Any, tiny_flags: list[str], trained: Any, tmp_path: Path
) -> None:
    done = cli("train", *tiny_flags, "--save_dir", tmp_path, "--dense_fraction", 0.5, "--init", trained.model)
    assert done.code == 2
    assert "dense_fraction is 0.5: it must be 0 with --init" in done.err
    assert done.err.count("\n") == 1


def test_a_dense_model_has_nothing_to_split(cli: Any, tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--epochs", 1, "--dense", "true", "--dense_fraction", 0.5, "--save_dir", tmp_path]
    assert cli("train", *flags).code == 0
