"""The experts' load goes into a history and comes back as it was."""

from __future__ import annotations

import pytest
import torch
from tests.evaluation.models import captioner, captions, random_block

from diffmoe.evaluation.experts import tokens_per_expert, trace_experts
from diffmoe.evaluation.history import load_history, routing_metrics


def test_there_and_back() -> None:
    found = random_block()
    row = routing_metrics([found])
    load = tokens_per_expert(found)
    assert row["expert_load/image_0/2"] == pytest.approx(float(load[2] / load.sum()))
    assert row["router_entropy/image_0"] == 0
    rows = [{"epoch": 1.0}, {"epoch": 2.0, **row}, {"epoch": 3.0, **row}]
    ((place, (epochs, loads)),) = load_history(rows).items()
    assert (place, epochs) == (("image", 0), [2, 3])
    assert torch.allclose(loads, (load / load.sum()).expand(2, 4))
    assert load_history([{"epoch": 1.0, "lr": 0.1}]) == {}


def test_the_mean_entropy_is_over_real_tokens() -> None:
    trace = trace_experts(captioner(), captions())
    text = next(block for block in trace if block.place == "text")
    mean = float(text.entropy[text.real].mean())
    assert routing_metrics(trace)["router_entropy/text_0"] == pytest.approx(mean, rel=1e-6)
