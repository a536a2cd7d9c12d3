"""The experts' load goes into a history and comes back as it was."""

from __future__ import annotations

import pytest
import torch
from tests.evaluation.models import captioner, captions, random_block

from diffmoe.evaluation.experts import tokens_per_expert, trace_experts
from diffmoe.evaluation.history import first_experts, flutter, load_history, router_health, routing_metrics


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


def test_flutter_is_the_share_of_real_tokens_with_another_first_expert() -> None:
    before = {"image_0": torch.tensor([[0, 1, 2, -1]]), "text_0": torch.tensor([[3]])}
    now = {"image_0": torch.tensor([[0, 2, 1, -1]]), "image_1": torch.tensor([[0]])}
    assert flutter(before, now) == {"flutter/image_0": pytest.approx(2 / 3)}
    assert flutter({}, now) == {}


def test_the_first_experts_of_a_block_are_its_best() -> None:
    block = random_block()
    assert torch.equal(first_experts([block])["image_0"], block.expert_ids[..., 0])


def test_health_is_of_the_blocks_that_the_answer_goes_through() -> None:
    loads = {"image_0": [0.5, 0.25, 0.25, 0.0], "image_1": [0.25, 0.25, 0.25, 0.25], "text_0": [1.0, 0.0, 0.0, 0.0]}
    row = {f"expert_load/{name}/{expert}": load for name, of in loads.items() for expert, load in enumerate(of)}
    changed = {"flutter/image_0": 0.5, "flutter/image_1": 0.25, "flutter/text_0": 1.0}
    rows = [{"epoch": 1.0, **row, "flutter/image_0": float("nan")}, {"epoch": 2.0, **row, **changed}]
    expected = {"min_load": 0.0, "max_load": 2.0}  # four experts: a fair share is a quarter
    assert router_health(rows, {"image", "fusion"}) == [
        {"epoch": 1.0, **expected},
        {"epoch": 2.0, **expected, "flutter": 0.375},
    ]
    assert router_health([{"epoch": 1.0}], {"image"}) == []
