"""The learning rate by hand, and which weights decay."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from tests.small import SMALL

from diffmoe.config import TrainingConfig
from diffmoe.model.heads import ImageClassifier
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


def test_weight_decay_is_on_matrices_only():
    config = dataclasses.replace(
        SMALL, patch_size=2, patch_embed="conv", router_noise=True, classify_with="descriptions"
    )
    model = ImageClassifier(config, torch.ones(3, 1, 6, dtype=torch.int64))
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)  # each once
    assert decay.keys() == {id(parameter) for parameter in model.parameters()}
    found = {name for name, parameter in model.named_parameters() if decay[id(parameter)] == 0.3}
    matrices = re.compile(f"({'|'.join(DECAYED)})$")
    assert found == {name for name, _ in model.named_parameters() if matrices.search(name)}
    assert all(any(re.search(f"{end}$", name) for name in found) for end in DECAYED)
    assert set(decay.values()) == {0.3, 0.0}
