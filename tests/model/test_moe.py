"""The routed pool as a whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.pools import WIDTH, by_definition, make_pool, randn
from torch import Tensor

from diffmoe.model import dispatch
from diffmoe.model.dispatch import BACKENDS
from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routers import AttentiveRouter
from diffmoe.model.routing import Routing

few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)


@pytest.fixture(params=[name for name in BACKENDS if name != "grouped"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every pool of the test runs through this backend, however many tokens it gets."""
    monkeypatch.setattr(dispatch, "choose_backend", lambda *_: request.param)
    return request.param


def pool_by_definition(pool: GeneralExperts, x: Tensor, mask: Tensor | None = None) -> Tensor:
    normed = F.layer_norm(x, (WIDTH,), eps=pool.eps)
    routing = pool.router(normed, mask)
    return by_definition(normed, routing.expert_ids, routing.gates, pool.weights)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_pool_is_the_gated_sum_with_the_routers_gradients(top_k: int, masked: bool) -> None:
    pool, x = make_pool(top_k=top_k), randn(3, 5, WIDTH).requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]]) if masked else None
    inputs = (x, *pool.parameters())
    y, _ = pool(x, mask)
    expected = pool_by_definition(pool, x, mask)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.square().sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), inputs))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_a_pool_of_all_slices_of_a_dense_layer_is_that_layer(num_experts: int) -> None:
    """E = K, gates that add up to K and are equal: outputs and gradients, in float64."""
    hidden = 3
    dense = Expert(WIDTH, num_experts * hidden / WIDTH).double()
    pool = GeneralExperts(WIDTH, num_experts, num_experts, hidden / WIDTH, gate_scale=float(num_experts)).double()
    with torch.no_grad():
        for number, parameter in enumerate(dense.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number))
        pool.router.get_parameter("keys").zero_()  # all experts are as likely
        pool.gain.copy_(dense.norm.weight.expand_as(pool.gain))
        pool.shift.copy_(dense.norm.bias.expand_as(pool.shift))
        pool.fc1_weight.copy_(dense.fc1.weight.unflatten(0, (num_experts, hidden)))
        pool.fc1_bias.copy_(dense.fc1.bias.unflatten(0, (num_experts, hidden)))
        pool.fc2_weight.copy_(dense.fc2.weight.unflatten(1, (num_experts, hidden)).transpose(0, 1))
        pool.fc2_bias.copy_((dense.fc2.bias / num_experts).expand_as(pool.fc2_bias))
    x = randn(3, 5, WIDTH, seed=9).requires_grad_()
    (y, _), expected = pool(x), dense(x)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.square().sum(), (x, pool.fc1_weight, pool.fc2_weight, pool.gain))
    wanted = torch.autograd.grad(expected.square().sum(), (x, dense.fc1.weight, dense.fc2.weight, dense.norm.weight))
    torch.testing.assert_close(grads[0], wanted[0])
    torch.testing.assert_close(grads[1].flatten(0, 1), wanted[1])
    torch.testing.assert_close(grads[2].transpose(0, 1).flatten(1), wanted[2])
    torch.testing.assert_close(grads[3].sum(0), wanted[3])


@pytest.mark.usefixtures("backend")
def test_pool_commutes_with_a_permutation_of_the_tokens() -> None:
    pool, x, order = make_pool(), randn(11, WIDTH), torch.randperm(11)
    (y, routing), (y_moved, routing_moved) = pool(x), pool(x[order])
    torch.testing.assert_close(y_moved, y[order])
    assert torch.equal(routing_moved.expert_ids, routing.expert_ids[order])
    assert torch.equal(routing_moved.tokens_per_expert, routing.tokens_per_expert)


def test_a_token_does_not_see_its_batch_mates() -> None:
    # Dropless. 64 * 5 tokens * 2 slots go through the sorted backend, 5 * 2 through the padded one.
    pool, x = make_pool(), randn(64, 5, WIDTH)
    together = pool(x)[0]
    for number in (0, 17, 63):
        torch.testing.assert_close(pool(x[number : number + 1])[0][0], together[number])


@pytest.mark.usefixtures("backend")
def test_masked_tokens_come_out_as_zeros_uncounted_and_unseen() -> None:
    pool, x = make_pool(), randn(2, 6, WIDTH)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    real = mask.bool()
    y, routing = pool(x, mask)
    y_garbage, routing_garbage = pool(torch.where(real[..., None], x, 1e3 * randn(2, 6, WIDTH, seed=1)), mask)
    y_alone, routing_alone = pool(x[real])
    assert not y[~real].any()
    assert not routing.gates[~real].any()
    assert (routing.expert_ids[~real] == 4).all()
    torch.testing.assert_close(y[real], y_alone)
    torch.testing.assert_close(y_garbage, y)
    assert torch.equal(routing.tokens_per_expert, routing_alone.tokens_per_expert)
    assert torch.equal(routing.tokens_per_expert, routing_garbage.tokens_per_expert)


@few
@given(seed=seeds, real=st.lists(st.booleans(), min_size=8, max_size=8), top_k=st.integers(1, 4))
def test_the_counts_are_those_of_the_ids_and_sum_to_real_tokens_times_k(
    seed: int, real: list[bool], top_k: int
) -> None:
    mask = torch.tensor(real).view(2, 4)
    routing: Routing = make_pool(top_k=top_k)(randn(2, 4, WIDTH, seed=seed), mask)[1]
    assert routing.tokens_per_expert.sum() == mask.sum() * top_k
    for number in range(4):
        assert routing.tokens_per_expert[number] == (routing.expert_ids == number).sum()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_and_every_chosen_expert_get_a_gradient_and_no_other(top_k: int) -> None:
    pool = make_pool(top_k=top_k)
    pool.router.balance_bias[1] = -10  # never chosen
    y, routing = pool(randn(40, WIDTH))
    assert (routing.tokens_per_expert > 0).tolist() == [True, False, True, True]
    (y * randn(40, WIDTH, seed=1)).sum().backward()
    for weight in pool.weights:
        assert weight.grad is not None
        assert [bool(g.any()) for g in weight.grad] == [True, False, True, True]
    assert isinstance(pool.router, AttentiveRouter)
    for parameter in (pool.router.query.weight, pool.router.keys):
        assert parameter.grad is not None
        assert parameter.grad.any()


@pytest.mark.usefixtures("backend")
def test_dropout_is_twice_in_an_expert_and_in_training_only() -> None:
    # One expert, so the gate is 1. Its hidden units are relu(1) = 1, its second layer adds the pair (2i, 2i + 1) of
    # them, halved: 1. At p = 1/2 each unit counts 0 or 2, their half sum 0, 1 or 2 with 1/4, 1/2, 1/4, and the second
    # dropout keeps and doubles half of these: 0, 2 or 4 with 5/8, 1/4, 1/8.
    pool = GeneralExperts(WIDTH, 1, 1, expansion_factor=2, activation="relu", dropout=0.5)
    with torch.no_grad():
        pool.fc1_weight.zero_()
        pool.fc1_bias.fill_(1)
        pool.fc2_weight.copy_(torch.eye(WIDTH).repeat_interleave(2, 1) / 2)
    torch.manual_seed(0)
    y = pool(torch.randn(2000, WIDTH))[0]
    shares = [(y == value).float().mean().item() for value in (0, 2, 4)]
    assert shares == pytest.approx([5 / 8, 1 / 4, 1 / 8], abs=0.02)
    assert torch.equal(pool.eval()(torch.randn(3, WIDTH))[0], torch.ones(3, WIDTH))


@pytest.mark.usefixtures("backend")
def test_no_tokens_at_all() -> None:
    y, routing = make_pool()(randn(0, 5, WIDTH))
    assert y.shape == (0, 5, WIDTH)
    assert not routing.tokens_per_expert.any()
