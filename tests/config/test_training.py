"""The loop's and the run's settings: the specification's optimizer, impossible values."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.config.mistakes import check_told

from diffmoe.config import RunConfig, TrainingConfig, UserError


def test_the_optimizers_defaults_are_the_specifications():
    assert (TrainingConfig().lr, TrainingConfig().weight_decay) == (0.0005, 0.01)


IMPOSSIBLE: list[tuple[type, str, Any, str]] = [
    *((TrainingConfig, name, 0, "at least 1") for name in ("epochs", "batch_size", "accumulation_steps")),
    *((TrainingConfig, name, -1, "at least 0") for name in ("weight_decay", "clip_norm", "patience", "seed")),
    (TrainingConfig, "seed", 2**64, "at most|less|below"),
    *(
        (TrainingConfig, name, value, "over 0 and finite")
        for name in ("lr", "muon_lr", "expert_lr_scale")
        for value in (0.0, -1.0, math.inf, math.nan)
    ),
    *((TrainingConfig, name, 1.0, "not including, 1") for name in ("warmup_fraction", "label_smoothing")),
    (TrainingConfig, "final_lr_fraction", 1.1, "from 0 to 1"),
    (RunConfig, "num_devices", 0, "at least 1"),
]


@pytest.mark.parametrize(("config", "name", "value", "right"), IMPOSSIBLE)
def test_impossible_value_is_one_line(config, name, value, right):
    check_told(config, name, value, right)


def test_resuming_and_overwriting_exclude_each_other():
    with pytest.raises(UserError, match=r"resume.*without overwrite"):
        RunConfig(resume=True, overwrite=True)
