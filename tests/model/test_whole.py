"""A whole pool is one FFN, of its experts' mean weights; and what it computes anyway where they are copies of one."""

from __future__ import annotations

import pytest
import torch
from tests.model.pools import WIDTH, make_pool, randn
from torch import Tensor, nn

from diffmoe.config import TrainingConfig
from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routers import ROUTERS
from diffmoe.training.optimizer import make_optimizer


def mean_expert(pool: GeneralExperts) -> Expert:
    expert = Expert(WIDTH, 2).double()
    own = (expert.norm.weight, expert.norm.bias, expert.fc1.weight, expert.fc1.bias, expert.fc2.weight, expert.fc2.bias)
    with torch.no_grad():
        for parameter, stack in zip(own, pool.weights, strict=True):
            parameter.copy_(stack.mean(0))
    return expert


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("top_k", "scale"), [(1, 1.0), (2, 1.0), (2, 1.7)])
def test_is_the_ffn_of_the_mean_weights_and_each_expert_gets_its_share_of_the_gradient(
    top_k: int, scale: float, masked: bool
) -> None:
    pool, x = make_pool(top_k=top_k), randn(3, 5, WIDTH, seed=9).requires_grad_()
    pool.router.gate_scale, pool.whole = scale, True
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]]) if masked else None
    y, routing = pool(x, mask)
    expert = mean_expert(pool)
    total = routing.gates.sum(-1, keepdim=True).detach()
    if top_k > 1:
        real = torch.ones(3, 5, 1).double() if mask is None else mask[..., None].double()
        torch.testing.assert_close(total, scale * real)
    expected = total * expert(x)
    torch.testing.assert_close(y, expected)
    grad_x, *grads = torch.autograd.grad(y.square().sum(), (x, *pool.weights))
    wanted_x, *wanted = torch.autograd.grad(expected.square().sum(), (x, *expert.parameters()))
    torch.testing.assert_close(grad_x, wanted_x)
    for grad, of_one in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, (of_one / 4).expand_as(grad))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_copies_of_one_compute_the_same_by_themselves(router: str, top_k: int) -> None:
    pool = GeneralExperts(WIDTH, 4, top_k, 2, router=router, gate_scale=1.3).double().eval()
    assert pool.is_alike is (router == "merged")
    nn.init.normal_(pool.fc1_bias)
    pool.make_alike()
    assert pool.is_alike
    x, mask = randn(3, 5, WIDTH), torch.arange(5) < torch.tensor([[5], [2], [4]])
    by_themselves, routing = pool(x, mask)
    pool.whole = True
    whole, same_routing = pool(x, mask)
    torch.testing.assert_close(whole[mask], by_themselves[mask])
    assert torch.equal(same_routing.expert_ids, routing.expert_ids)


def test_the_router_gets_no_gradient_through_what_comes_out() -> None:
    pool = make_pool(top_k=1)
    pool.whole = True
    y, routing = pool(randn(7, WIDTH))
    y.square().sum().backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in pool.router.parameters())
    routing.probs.square().sum().backward()  # as a balance loss
    assert all(parameter.grad is not None for parameter in pool.router.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_copies_stay_copies_and_move_as_one_expert_would(optimizer: str) -> None:
    """A quarter of the gradient each moves them as far: both optimizers are blind to its scale."""
    x, target = randn(64, WIDTH, seed=5), randn(64, WIDTH, seed=6)
    config = TrainingConfig(optimizer=optimizer, lr=0.01)  # pyright: ignore[reportArgumentType]

    def after(num_experts: int, top_k: int) -> tuple[Tensor, ...]:
        pool = make_pool(4, 2)
        pool.make_alike()
        copies = GeneralExperts(WIDTH, num_experts, top_k, 2).double()
        with torch.no_grad():
            for own, stack in zip(copies.weights, pool.weights, strict=True):
                own.copy_(stack[:1].expand_as(own))
        copies.whole = True
        moved = make_optimizer(nn.ModuleDict({"image_encoder": copies}), config)
        for _ in range(10):
            (copies(x)[0] - target).square().mean().backward()
            moved.step()
            moved.zero_grad()
        assert copies.is_alike
        return tuple(stack[0].detach() for stack in copies.weights)

    start = make_pool(4, 2).weights
    for four, one, before in zip(after(4, 2), after(1, 1), start, strict=True):
        assert (one - before[0]).abs().max() > 0.01
        torch.testing.assert_close(four, one, rtol=0, atol=1e-4)
