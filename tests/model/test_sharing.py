"""Experts that share their gradients: from nothing of the others' to one FFN that sees every token."""

from __future__ import annotations

import pytest
import torch
from tests.model.pools import WIDTH, make_pool, randn
from torch import Tensor

from diffmoe.config import TrainingConfig
from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.training.optimizer import make_optimizer


def gradients(pool: GeneralExperts, x: Tensor) -> list[Tensor]:
    """What a loss sends to the experts."""
    pool.zero_grad()
    pool(x)[0].square().sum().backward()
    return [stack.grad for stack in pool.weights if stack.grad is not None]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_gets_its_own_and_of_the_sum(share: float) -> None:
    pool, x = make_pool(), randn(50, WIDTH)
    before = [grad.clone() for grad in gradients(pool, x)]
    pool.share_gradients(share)
    for stack, own in zip(pool.weights, before, strict=True):
        assert stack.grad is not None
        torch.testing.assert_close(stack.grad, (1 - share) * own + share * own.sum(0))
        assert (own != own[:1]).any()


def test_copies_that_share_all_are_taught_as_one_ffn_is() -> None:
    """Where each token has one expert, of whole weight: output and gradients of the dense layer."""
    pool = GeneralExperts(WIDTH, 4, 1, 2, router="random").double()
    pool.make_alike()
    dense = Expert(WIDTH, 2).double()
    own = (dense.norm.weight, dense.norm.bias, dense.fc1.weight, dense.fc1.bias, dense.fc2.weight, dense.fc2.bias)
    with torch.no_grad():
        for parameter, stack in zip(own, pool.weights, strict=True):
            parameter.copy_(stack[0])
    x = randn(6, 5, WIDTH)
    y, routing = pool(x)
    assert len(routing.expert_ids.unique()) == 4
    torch.testing.assert_close(y, dense(x))
    gradients(pool, x)
    pool.share_gradients(1)
    dense(x).square().sum().backward()
    for stack, parameter in zip(pool.weights, own, strict=True):
        assert stack.grad is not None
        assert parameter.grad is not None
        torch.testing.assert_close(stack.grad, parameter.grad.expand_as(stack))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_copies_stay_copies_only_where_they_share_all(optimizer: str) -> None:
    x, config = randn(50, WIDTH), TrainingConfig(optimizer=optimizer, lr=0.01)  # pyright: ignore[reportArgumentType]
    for share, stays in ((0.0, False), (0.9, False), (1.0, True)):
        pool = make_pool()
        pool.make_alike()
        moved = make_optimizer(torch.nn.ModuleDict({"image_encoder": pool}), config)
        for _ in range(3):
            gradients(pool, x)
            pool.share_gradients(share)
            moved.step()
        assert pool.is_alike is stays


def test_what_has_no_gradient_is_passed_over() -> None:
    pool = make_pool()
    pool.share_gradients(0.5)
    assert all(stack.grad is None for stack in pool.weights)
