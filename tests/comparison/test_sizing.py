"""Baselines are brought to the first arm's size: counted, not taken for granted."""

from __future__ import annotations

import pytest
import torch

from diffmoe.comparison.arms import ARMS, Match, parse_arms
from diffmoe.comparison.sizing import TOLERANCE, nearest_count, sized
from diffmoe.config import ModelConfig
from diffmoe.model.heads import Head
from diffmoe.model.parameters import count_parameters
from diffmoe.profiling.costs import flops_per_image
from diffmoe.tasks.classification import Classification


def build(config: ModelConfig) -> Head:
    settings = parse_arms(["moe", "dense"], ["--preset", "tiny"], "flops", "")[0].settings
    return Classification().made_up(type(settings)(**{**vars(settings), "model": config}))


def flops(config: ModelConfig) -> int:
    model = build(config)
    return flops_per_image(model, lambda size: Classification().noise(model, size))


def parameters(config: ModelConfig) -> int:
    return count_parameters(build(config))[0]


def costs(match: Match, words: list[str], dataset: str) -> dict[str, float]:
    """Of each arm, over the first one's."""
    argv = ["--preset", "tiny", "--dataset", dataset]
    cost = parameters if match == "parameters" else flops
    arms = sized(parse_arms(words, argv, match, ""), match, cost)
    first = cost(arms[0].settings.model)
    return {arm.name: cost(arm.settings.model) / first for arm in arms}


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_arms_have_equal_flops_a_picture(dataset: str) -> None:
    for name, ratio in costs("flops", list(ARMS), dataset).items():
        assert ratio == pytest.approx(1, abs=TOLERANCE), name


def test_arms_have_equal_parameters_where_those_are_asked_for() -> None:
    for name, ratio in costs("parameters", ["moe", "dense", "cnn"], "digits").items():
        assert ratio == pytest.approx(1, abs=TOLERANCE), name


def test_an_arm_whose_size_is_given_keeps_it() -> None:
    ratios = costs("flops", ["moe", "cnn:embed_dim=32"], "digits")
    assert ratios["cnn_embed_dim_32"] < 0.5


@pytest.mark.parametrize(("target", "count"), [(-5, 1), (1, 1), (9, 3), (12, 3), (13, 4), (10**4, 50)])
def test_the_nearest_count(target: float, count: int) -> None:
    assert nearest_count(lambda n: n * n, target, 50) == count  # 9 and 16 are 12.5 apart from their middle


def test_counting_flops_leaves_the_model_as_it_was() -> None:
    config = parse_arms(["moe", "dense"], ["--preset", "tiny"], "flops", "")[0].settings.model
    model = build(config)
    pictures = Classification().noise(model, 3)
    before = model.run(pictures).embedding  # pyright: ignore[reportAttributeAccessIssue]
    training = model.training
    assert flops_per_image(model, lambda size: Classification().noise(model, size)) > 0
    assert model.training == training
    torch.testing.assert_close(model.run(pictures).embedding, before, rtol=0, atol=0)
