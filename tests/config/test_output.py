"""The settings of captions and pictures: impossible values."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.config.mistakes import check_told

from diffmoe.config import GenerationConfig, VisualizationConfig

IMPOSSIBLE: list[tuple[type, str, Any, str]] = [
    (GenerationConfig, "beams", 0, "at least 1"),
    *((GenerationConfig, name, -1, "at least 0") for name in ("no_repeat_ngram", "min_caption_len", "sample_top_k")),
    *((GenerationConfig, "temperature", value, "at least 0.001") for value in (0.0, 1e-300, math.nan)),
    *((GenerationConfig, "sample_top_p", value, "over 0 and at most 1") for value in (0.0, 1.1)),
    (VisualizationConfig, "dpi", 29, "at least 30"),
    *((VisualizationConfig, name, 0, "at least 1") for name in ("examples", "weakest_classes")),
]


@pytest.mark.parametrize(("config", "name", "value", "right"), IMPOSSIBLE)
def test_impossible_value_is_one_line(config, name, value, right):
    check_told(config, name, value, right)
