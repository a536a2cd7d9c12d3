"""The experts' arithmetic: the backward by hand, and rows that are nobody's."""

from __future__ import annotations

import pytest
import torch
from tests.model.pools import WIDTH, by_definition, make_pool, randn
from torch import Tensor

from diffmoe.model.experts import RunExperts, _RunExperts, batched_experts, looped_experts


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_the_backward_by_hand_is_autograds(activation: str) -> None:
    pool, x, scale = make_pool(), randn(32, WIDTH).requires_grad_(), 1.0 + (randn(32, 12, seed=5) > 0)
    inputs = (x, *pool.weights)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return _RunExperts.apply(x, [8, 0, 3, 5], activation, scale, *weights)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("run", [looped_experts, batched_experts])
@pytest.mark.parametrize("rows", [[4, 0, 6, 2], [4, 4, 4, 4]])
def test_each_row_is_its_experts_and_nobodys_are_zero(run: RunExperts, rows: list[int]) -> None:
    # Three rows more than the experts have; batched rows of unequal experts come in pairs.
    pool, x = make_pool(), randn(sum(rows) + 3, WIDTH)
    y = run(x, rows, pool.weights, "gelu", 0.0)
    expert_ids = torch.arange(4).repeat_interleave(torch.tensor(rows))[:, None]
    expected = by_definition(x[:-3], expert_ids, torch.ones(sum(rows), 1), pool.weights)
    torch.testing.assert_close(y[:-3], expected)
    assert not y[-3:].any()
