"""Baselines of the first arm's size: its FLOPs a picture, or its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from diffmoe.comparison.arms import Arm, Match
from diffmoe.config import ModelConfig

Cost = Callable[[ModelConfig], float]
"""What a model of a config costs: more with each unit of width."""
TOLERANCE = 0.02
"""Costs that differ by no more are equal."""
WIDTH_STEP = 16
"""Widths of a CNN are multiples of this: processors like them."""
MOST_UNITS = 64
"""A layer becomes at most so many times as wide as it was."""


def sized(arms: Sequence[Arm], match: Match, cost: Cost) -> list[Arm]:
    """The arms, those that may be brought to the first one's cost; at equal time the FLOPs are equal too."""
    target = cost(arms[0].settings.model)
    fit = {"cnn": fit_cnn, "cnn-fast": fit_cnn, "vit": fit_transformer, "timm": fit_transformer}
    if match == "parameters":
        fit["dense"] = fit_dense
    return [
        arm if arm.is_sized or arm.kind not in fit else arm.with_model(fit[arm.kind](arm.settings.model, cost, target))
        for arm in arms
    ]


def fit_cnn(config: ModelConfig, cost: Cost, target: float) -> ModelConfig:
    """The width at which three like stages come nearest; then the third one's channels."""

    def of_width(steps: int) -> ModelConfig:
        width = steps * WIDTH_STEP
        return dataclasses.replace(config, embed_dim=width, num_heads=1, expansion_factor=1)

    width = nearest_count(lambda steps: cost(of_width(steps)), target, MOST_UNITS)
    return _fit_expansion(of_width(width), cost, target)


def fit_transformer(config: ModelConfig, cost: Cost, target: float) -> ModelConfig:
    """As many blocks of the usual expansion as come nearest; then their hidden units."""
    one, two = (cost(dataclasses.replace(config, img_encoder_layers=depth)) for depth in (1, 2))
    depth = max(1, 1 + round((target - one) / (two - one)))
    return _fit_expansion(dataclasses.replace(config, img_encoder_layers=depth), cost, target)


def fit_dense(config: ModelConfig, cost: Cost, target: float) -> ModelConfig:
    """The dense expert's hidden units."""

    def of_units(units: int) -> ModelConfig:
        return dataclasses.replace(config, dense_units=units)

    return of_units(nearest_count(lambda units: cost(of_units(units)), target, MOST_UNITS * config.dense_hidden))


def _fit_expansion(config: ModelConfig, cost: Cost, target: float) -> ModelConfig:
    def of_units(units: int) -> ModelConfig:
        return dataclasses.replace(config, expansion_factor=units / config.embed_dim)

    most = MOST_UNITS * config.embed_dim
    return of_units(nearest_count(lambda units: cost(of_units(units)), target, most))


def nearest_count(cost: Callable[[int], float], target: float, most: int) -> int:
    """The count from 1 to `most` whose cost, which rises, is nearest to the target."""
    low, high = 1, 2
    while high < most and cost(high) < target:  # costly ones are not tried where they are not near
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return min((low, high), key=lambda count: abs(cost(count) - target))
