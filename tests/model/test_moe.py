"""The router's rules, and the dispatched pool against `sum_k gate_k * expert_k(x)`, gradients too."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmoe.model import moe, sorted_rows
from diffmoe.model.dispatch import BACKENDS, padded_experts, why_not
from diffmoe.model.moe import AttentiveRouter, GeneralExperts, Routing
from diffmoe.model.sorted_rows import ExpertWeights, sorted_experts

WIDTH = 6
few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)
EXACT = [name for name in BACKENDS if name != "grouped"]
"""The backends that run in float64; grouped_mm takes float32 at most, and has a test of its own."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=EXACT)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every pool of the test runs through this backend, however many tokens it gets."""
    monkeypatch.setattr(moe, "choose_backend", lambda *_: request.param)
    return request.param


def make_pool(num_experts: int = 4, top_k: int = 2, dropout: float = 0.0, seed: int = 0) -> GeneralExperts:
    """In float64, with every parameter away from the zeros and ones that would hide a missing term."""
    pool = GeneralExperts(WIDTH, num_experts, top_k, expansion_factor=2, dropout=dropout).double()
    with torch.no_grad():
        for number, parameter in enumerate(pool.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + number))
    return pool


def weights_of(pool: GeneralExperts) -> ExpertWeights:
    return ExpertWeights(*(getattr(pool, name) for name in ExpertWeights._fields))


def by_definition(x: Tensor, expert_ids: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
    """Every expert on every token, weighted with its gate, which is 0 where it was not chosen."""
    y = torch.zeros_like(x)
    for number in range(len(weights.gain)):
        gain, shift, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (w[number] for w in weights)
        out = F.gelu((x * gain + shift) @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias
        y = y + (gates * (expert_ids == number)).sum(-1, keepdim=True) * out
    return y


def pool_by_definition(pool: GeneralExperts, x: Tensor, mask: Tensor | None = None) -> Tensor:
    normed = F.layer_norm(x, (WIDTH,), eps=pool.eps)
    routing = pool.router(normed, mask)
    return by_definition(normed, routing.expert_ids, routing.gates, weights_of(pool))


# --- Router ---


@few
@given(embed_dim=st.integers(1, 80), num_experts=st.integers(1, 12))
def test_keys_start_orthonormal(embed_dim: int, num_experts: int) -> None:
    keys = AttentiveRouter(embed_dim, num_experts, 1).keys
    torch.testing.assert_close(keys @ keys.T, torch.eye(num_experts), atol=1e-5, rtol=0)


def test_logits_are_scaled_products_of_query_and_key() -> None:
    router, x = AttentiveRouter(WIDTH, 4, 2).double(), randn(5, WIDTH)
    query = router.query(x[3])
    expected = torch.stack([query @ key / sqrt(len(query)) for key in router.keys])  # over sqrt(R), as in attention
    torch.testing.assert_close(router(x).logits[3], expected)


@pytest.mark.parametrize("embed_dim", [16, 128])
def test_logits_start_with_unit_variance(embed_dim: int) -> None:
    # Of 30 routers' 4 logits each: the mean of 120 squared normals, give or take sqrt(2 / 120) = 0.13.
    torch.manual_seed(0)
    logits = torch.stack([AttentiveRouter(embed_dim, 4, 2)(torch.randn(200, embed_dim)).logits for _ in range(30)])
    assert logits.var().item() == pytest.approx(1, abs=0.3)


@few
@given(seed=seeds, num_experts=st.integers(1, 6), data=st.data())
def test_the_chosen_are_the_most_probable_and_the_gates_their_shares(
    seed: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    router = AttentiveRouter(WIDTH, num_experts, top_k).double()
    routing = router(randn(3, 5, WIDTH, seed=seed))
    best, ids = routing.probs.sort(dim=-1, descending=True)
    torch.testing.assert_close(routing.probs, routing.logits.softmax(-1))
    assert torch.equal(routing.expert_ids, ids[..., :top_k])
    if top_k == 1:  # the probability itself: over its own sum it would be 1, and the router would get no gradient
        assert torch.equal(routing.gates, best[..., :1])
    else:
        torch.testing.assert_close(routing.gates.sum(-1), torch.ones(3, 5, dtype=torch.float64))
        torch.testing.assert_close(routing.gates[..., 0] / routing.gates[..., 1], best[..., 0] / best[..., 1])


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_outside_the_experts_is_an_error_naming_both(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k is {top_k}.*4"):
        AttentiveRouter(WIDTH, 4, top_k)


def test_routing_is_float32_under_autocast() -> None:
    pool, x = GeneralExperts(WIDTH, 4, 2), torch.randn(5, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = pool(x)
    plain = pool(x)[1]
    assert y.dtype == torch.bfloat16
    for name in ("logits", "probs", "gates", "expert_ids"):
        assert torch.equal(getattr(routing, name), getattr(plain, name))


def test_noise_is_of_the_learned_spread_and_in_training_only() -> None:
    torch.manual_seed(0)
    router = AttentiveRouter(WIDTH, 4, 2, noise=True)
    x = torch.randn(5000, WIDTH)
    noisy, again = router(x).logits, router(x).logits
    router.eval()
    plain = router(x).logits
    assert torch.equal(plain, router(x).logits)
    assert not torch.equal(noisy, again)
    # The noise layer starts at zero: softplus(0) = log 2.
    assert (noisy - plain).std().item() == pytest.approx(log(2), rel=0.03)
    assert (noisy - plain).mean().item() == pytest.approx(0, abs=0.03)


def test_without_noise_training_routes_as_evaluation() -> None:
    router, x = AttentiveRouter(WIDTH, 4, 2), torch.randn(9, WIDTH)
    assert torch.equal(router.train()(x).logits, router.eval()(x).logits)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_bias_changes_the_choice_but_not_the_gates(top_k: int) -> None:
    router = AttentiveRouter(WIDTH, 4, top_k).double()
    x = randn(20, WIDTH)
    probs = router(x).probs
    router.balance_bias[2] = 1  # over any probability: everyone's first choice
    routing = router(x)
    assert torch.equal(routing.probs, probs)
    assert (routing.expert_ids[:, 0] == 2).all()
    chosen = probs.gather(-1, routing.expert_ids)
    torch.testing.assert_close(routing.gates, chosen if top_k == 1 else chosen / chosen.sum(-1, keepdim=True))


def test_the_balance_bias_moves_against_the_load() -> None:
    router = AttentiveRouter(WIDTH, 4, 1)
    router.update_balance_bias(torch.tensor([6, 2, 1, 3]), 0.1)  # the mean is 3
    torch.testing.assert_close(router.balance_bias, torch.tensor([-0.1, 0.1, 0.1, 0.0]))


def test_the_balance_bias_evens_the_load_out() -> None:
    torch.manual_seed(0)
    router = AttentiveRouter(WIDTH, 4, 1).double()
    x = randn(400, WIDTH) + 0.6 * router.keys[0].detach() @ router.query.weight.detach()  # lean to expert 0
    before = router(x).tokens_per_expert
    for _ in range(200):
        router.update_balance_bias(router(x).tokens_per_expert, 0.01)
    after = router(x).tokens_per_expert
    assert before[0] > 200

    assert after.max() < 120  # 100 each would be even


# --- Dispatch: the backends, called directly ---


@st.composite
def dispatches(draw: st.DrawFn) -> tuple[int, int, int, list[int], bool, int]:
    """Tokens, experts, K, the experts in use (the rest stay empty), whether there is padding, seed."""
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, num_experts))
    used = draw(st.permutations(range(num_experts)))[: draw(st.integers(top_k, num_experts))]
    return draw(st.integers(1, 12)), num_experts, top_k, list(used), draw(st.booleans()), draw(seeds)


@pytest.mark.parametrize("name", EXACT)
@few
@given(case=dispatches())
@example(case=(7, 4, 1, [2], False, 0))  # all tokens to one expert, three empty
@example(case=(1, 4, 2, [3, 0], False, 0))  # one token
@example(case=(5, 3, 3, [0, 1, 2], True, 0))  # every expert, some padding
@example(case=(40, 4, 1, [2], False, 0))  # the same, so many that padding all experts would not pay
@example(case=(40, 5, 2, [1, 3], True, 0))  # two experts, some padding
@example(case=(70, 2, 2, [0, 1], True, 0))  # enough slots for rows rounded up to a multiple of 8
def test_dispatch_is_the_gated_sum_with_all_its_gradients(
    name: str, case: tuple[int, int, int, list[int], bool, int]
) -> None:
    num_tokens, num_experts, top_k, used, padding, seed = case
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, len(used), generator=generator).argsort(-1)[:, :top_k]
    ids = torch.tensor(used)[order]
    gates = randn(num_tokens, top_k, seed=seed)
    if padding:
        nowhere = torch.rand(num_tokens, 1, generator=generator) < 0.4
        ids, gates = ids.masked_fill(nowhere, num_experts), gates.masked_fill(nowhere, 0)
    weights = weights_of(make_pool(num_experts, top_k, seed=seed))
    inputs = (randn(num_tokens, WIDTH, seed=seed + 1).requires_grad_(), gates.requires_grad_(), *weights)
    probe = randn(num_tokens, WIDTH, seed=seed + 2)

    expected = by_definition(inputs[0], ids, gates, weights)
    y = BACKENDS[name](inputs[0], ids, gates, weights, "gelu", 0.0)
    torch.testing.assert_close(y, expected)
    expected_grads = torch.autograd.grad((expected * probe).sum(), inputs)
    grads = torch.autograd.grad((y * probe).sum(), inputs, materialize_grads=True)  # padding alone uses no weight
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("others", [[0] * 40, [0, 3] * 20, list(range(8)) * 5])
def test_a_tokens_bits_do_not_depend_on_where_others_go(others: list[int]) -> None:
    # 8 tokens to experts of their own, alone and beside 40 others: all to one expert, to two, to all eight.
    weights, x = weights_of(GeneralExperts(32, 8, 1)), torch.randn(48, 32)
    ids = torch.tensor([*range(8), *others])[:, None]
    alone, beside = (padded_experts(x[:n], ids[:n], torch.ones(n, 1), weights, "gelu", 0.0) for n in (8, 48))
    assert torch.equal(alone, beside[:8])


@pytest.mark.parametrize("name", EXACT)
def test_padding_alone_comes_out_as_zeros(name: str) -> None:
    weights, nowhere = weights_of(make_pool()), torch.full((3, 2), 4)
    y = BACKENDS[name](randn(3, WIDTH), nowhere, torch.zeros(3, 2, dtype=torch.float64), weights, "gelu", 0.0)
    assert torch.equal(y, torch.zeros(3, WIDTH, dtype=torch.float64))


def test_rounding_the_rows_up_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    weights, gates = weights_of(pool), randn(9, 2)
    ids = torch.tensor([[0, 1], [3, 0], [4, 4], [1, 3]] * 2 + [[0, 3]])  # expert 2 is empty, two tokens are padding
    x = randn(9, WIDTH, seed=1).requires_grad_()
    expected = by_definition(x, ids, gates, weights)
    expected_grads = torch.autograd.grad(expected.square().sum(), (x, *weights))
    for multiple in (1, 2, 8, 64):
        monkeypatch.setattr(sorted_rows, "row_multiple", lambda slots, experts, multiple=multiple: multiple)
        y = sorted_experts(x, ids, gates, weights, "gelu", 0.0)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, *weights)), expected_grads)


def test_grouped_experts_are_the_gated_sum_with_all_its_gradients() -> None:
    # Widths of a multiple of 16 bytes, an empty expert, padding; grouped_mm sums in another order.
    pool = GeneralExperts(8, 4, 2, expansion_factor=2)
    with torch.no_grad():
        for number, parameter in enumerate(pool.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number))
    weights = weights_of(pool)
    ids = torch.tensor([[0, 1], [3, 0], [4, 4], [1, 3]] * 20)
    gates = randn(80, 2, seed=1).float().masked_fill(ids == 4, 0).requires_grad_()
    x = randn(80, 8, seed=2).float().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, gates, *weights)]
    expected = by_definition(exact[0], ids, exact[1], ExpertWeights(*exact[2:]))
    y = BACKENDS["grouped"](x, ids, gates, weights, "gelu", 0.0)
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(y, expected, **close)
    probe = randn(80, 8, seed=3)
    expected_grads = torch.autograd.grad((expected * probe).sum(), exact)
    for grad, other in zip(torch.autograd.grad((y * probe).sum(), (x, gates, *weights)), expected_grads, strict=True):
        if grad.shape == ids.shape:  # the router masks the gates of padding, and with them what comes back here
            grad = grad.masked_fill(ids == 4, 0)
        torch.testing.assert_close(grad, other, **close)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_the_backward_by_hand_is_autograds(activation: str) -> None:
    pool, x, scale = make_pool(), randn(32, WIDTH).requires_grad_(), 1.0 + (randn(32, 12, seed=5) > 0)
    inputs = (x, *weights_of(pool))

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return sorted_rows._RunExperts.apply(x, [8, 0, 3, 5, 16], activation, scale, *weights)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", ["sorted", "padded", "masked"])
def test_autocast_computes_in_bfloat16(backend: str) -> None:
    pool, x = GeneralExperts(16, 4, 2, backend=backend), torch.randn(300, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pool(x)[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), pool(x)[0], rtol=0.05, atol=0.002)


def test_a_graph_for_export_holds_no_shape_that_depends_on_the_data() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = GeneralExperts(8, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x)[0]

    layer, x = Layer().eval(), torch.randn(9, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert not {str(node.target) for node in program.graph.nodes} & {
        "aten.sort.stable",
        "aten._local_scalar_dense.default",
    }


def test_an_unknown_backend_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"backend is 'fast': .* auto or one of sorted, padded, grouped, masked"):
        GeneralExperts(8, 4, 2, backend="fast")


def test_a_backend_that_cannot_run_says_why_and_which_can() -> None:
    pool = GeneralExperts(8, 4, 2, backend="grouped").double()
    with pytest.raises(ValueError, match=r"'grouped' cannot run here: .*float64; sorted, padded, masked and auto can"):
        pool(torch.randn(3, 8, dtype=torch.float64))
    odd = GeneralExperts(6, 4, 2, backend="grouped")
    with pytest.raises(ValueError, match="multiple of 16 bytes, which 6 of"):
        odd(torch.randn(3, 6))
    assert why_not("grouped", torch.randn(3, 8), weights_of(GeneralExperts(8, 4, 2))) is None


def test_what_does_not_fit_is_named() -> None:
    pool = GeneralExperts(8, 4, 2)
    with pytest.raises(ValueError, match=r"x is torch.float32 of shape \(3, 7\): it must be floating and \(..., 8\)"):
        pool(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        pool(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask is of shape \(2,\): it must be \(3,\)"):
        pool(torch.randn(3, 8), torch.ones(2))
    with pytest.raises(FloatingPointError, match="gates are not finite"):
        pool(torch.full((3, 8), torch.nan))
    with pytest.raises(ValueError, match=r"\(3, 2\) and gates of shape \(3, 1\) do not fit 3 tokens"):
        pool.dispatch(torch.randn(3, 8), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 1))


# --- Pool ---


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
    for weight in weights_of(pool):
        assert weight.grad is not None
        assert [bool(g.any()) for g in weight.grad] == [True, False, True, True]
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
