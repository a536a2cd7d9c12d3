"""The learning rate by hand, and which weights decay."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import pytest
import torch
from lightning_fabric import Fabric
from tests.small import SMALL

from diffmoe.config import TrainingConfig
from diffmoe.model.heads import ImageClassifier
from diffmoe.training.objective import Trainee
from diffmoe.training.optimizer import learning_rate, make_optimizer


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


def make_model(patch_embed: Literal["conv", "whitened"] = "conv") -> ImageClassifier:
    config = dataclasses.replace(
        SMALL, patch_size=2, num_classes=10, patch_embed=patch_embed, router_noise=True, classify_with="descriptions"
    )
    return ImageClassifier(config, torch.ones(config.num_classes, 1, 6, dtype=torch.int64))


def test_weight_decay_is_on_matrices_only():
    model = make_model()
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)  # each once
    assert decay.keys() == {id(parameter) for parameter in model.parameters()}
    found = {name for name, parameter in model.named_parameters() if decay[id(parameter)] == 0.3}
    matrices = re.compile(f"({'|'.join(DECAYED)})$")
    assert found == {name for name, _ in model.named_parameters() if matrices.search(name)}
    assert all(any(re.search(f"{end}$", name) for name in found) for end in DECAYED)
    assert set(decay.values()) == {0.3, 0.0}


BY_MUON = (
    *(r"patch_embed\.projection\.\d+\.0\.weight", r"\.attention\.(query|key_value|out)\.weight"),
    *(r"cross_attention\.(query|key_value|out)\.weight", r"(global|modality)_expert\.fc[12]\.weight"),
    *(r"general_experts\.fc[12]_weight", r"general_experts\.router\.query\.weight"),
)
"""What Muon moves, by the end of the name: convolutions and the blocks' layers."""


def names_in(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for group in groups for parameter in group["params"]}


def test_muon_has_the_layers_and_adamw_the_rest():
    model = make_model("whitened")
    config = TrainingConfig(optimizer="muon", lr=0.01, muon_lr=0.05, expert_lr_scale=0.5, weight_decay=0.3)
    optimizer = make_optimizer(model, config)
    moved = [group for group in optimizer.param_groups if "momentum" in group]
    found = names_in(model, moved)
    matrices = re.compile(f"({'|'.join(BY_MUON)})$")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names_in(model, optimizer.param_groups) == trained
    assert "backbone.patch_embed.projection.0.weight" not in trained
    assert found == {name for name in trained if matrices.search(name)}
    assert all(any(re.search(f"{end}$", name) for name in found) for end in BY_MUON)
    assert all((group["weight_decay"], group["momentum"]) == (0.3, 0.95) for group in moved)
    experts = {name for name in trained if re.search(r"general_experts\.(gain|shift|fc)", name)}
    for group in optimizer.param_groups:
        for name in names_in(model, [group]):
            peak = (0.05 if name in found else 0.01) * (0.5 if name in experts else 1)
            assert group["lr"] == pytest.approx(peak), name
            assert group["lr"] == pytest.approx(group["scale"] * 0.01), name


@pytest.mark.parametrize(("scale", "groups"), [(1.0, 2), (0.5, 4)])
def test_experts_have_a_rate_of_their_own_with_adamw_too(scale, groups):
    model = make_model()
    optimizer = make_optimizer(model, TrainingConfig(expert_lr_scale=scale))
    assert len(optimizer.param_groups) == groups
    slower = names_in(model, [group for group in optimizer.param_groups if group["lr"] != 0.0005])
    experts = {name for name, _ in model.named_parameters() if re.search(r"general_experts\.(gain|shift|fc)", name)}
    assert slower == (experts if scale != 1 else set())


def test_the_schedule_moves_every_group_from_its_own_peak():
    model = make_model("whitened")
    config = TrainingConfig(optimizer="muon", lr=0.01, muon_lr=0.05, expert_lr_scale=0.5)
    trainee = Trainee(Fabric(accelerator="cpu", devices=1), model, config)
    peaks = [group["lr"] for group in trainee.optimizer.param_groups]
    trainee.step([(torch.randn(4, 1, 8, 8), torch.arange(4) % 3)], 0.002)
    assert [group["lr"] for group in trainee.optimizer.param_groups] == pytest.approx([peak / 5 for peak in peaks])
