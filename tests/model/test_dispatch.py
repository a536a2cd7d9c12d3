"""Every backend against `sum_k gate_k * expert_k(x)`, gradients too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.model.pools import WIDTH, by_definition, make_pool, randn
from torch import Tensor

from diffmoe.model import dispatch
from diffmoe.model.dispatch import BACKENDS, LocalDispatch, why_not
from diffmoe.model.experts import ExpertWeights
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routing import Plan, count_tokens

few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)
EXACT = [name for name in BACKENDS if name != "grouped"]
"""The backends that run in float64; grouped_mm takes float32 at most, and has a test of its own."""


def run(backend: str, x: Tensor, ids: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
    plan = Plan(ids, gates, count_tokens(ids, len(weights.gain)))
    return LocalDispatch(backend)(x, plan, weights, "gelu", 0.0)


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
    weights = make_pool(num_experts, top_k, seed=seed).weights
    inputs = (randn(num_tokens, WIDTH, seed=seed + 1).requires_grad_(), gates.requires_grad_(), *weights)
    probe = randn(num_tokens, WIDTH, seed=seed + 2)

    expected = by_definition(inputs[0], ids, gates, weights)
    y = run(name, inputs[0], ids, gates, weights)
    torch.testing.assert_close(y, expected)
    expected_grads = torch.autograd.grad((expected * probe).sum(), inputs)
    grads = torch.autograd.grad((y * probe).sum(), inputs, materialize_grads=True)  # padding alone uses no weight
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        if grad.shape == ids.shape:  # the router masks the gates of padding, and with them what comes back here
            grad = grad.masked_fill(ids == num_experts, 0)
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("others", [[0] * 40, [0, 3] * 20, list(range(8)) * 5])
def test_a_tokens_bits_do_not_depend_on_where_others_go(others: list[int]) -> None:
    # 8 tokens to experts of their own, alone and beside 40 others: all to one expert, to two, to all eight.
    weights, x = GeneralExperts(32, 8, 1).weights, torch.randn(48, 32)
    ids = torch.tensor([*range(8), *others])[:, None]
    alone, beside = (run("padded", x[:n], ids[:n], torch.ones(n, 1), weights) for n in (8, 48))
    assert torch.equal(alone, beside[:8])


@pytest.mark.parametrize("name", EXACT)
def test_padding_alone_comes_out_as_zeros(name: str) -> None:
    weights, nowhere = make_pool().weights, torch.full((3, 2), 4)
    y = run(name, randn(3, WIDTH), nowhere, torch.zeros(3, 2, dtype=torch.float64), weights)
    assert torch.equal(y, torch.zeros(3, WIDTH, dtype=torch.float64))


def test_rounding_the_rows_up_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    weights, gates = pool.weights, randn(9, 2)
    ids = torch.tensor([[0, 1], [3, 0], [4, 4], [1, 3]] * 2 + [[0, 3]])  # expert 2 is empty, two tokens are padding
    x = randn(9, WIDTH, seed=1).requires_grad_()
    expected = by_definition(x, ids, gates, weights)
    expected_grads = torch.autograd.grad(expected.square().sum(), (x, *weights))
    for multiple in (1, 2, 8, 64):
        monkeypatch.setattr(dispatch, "row_multiple", lambda slots, experts, multiple=multiple: multiple)
        y = run("sorted", x, ids, gates, weights)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, *weights)), expected_grads)


def test_grouped_experts_are_the_gated_sum_with_all_its_gradients() -> None:
    # Widths of a multiple of 16 bytes, an empty expert, padding; grouped_mm sums in another order.
    pool = GeneralExperts(8, 4, 2, expansion_factor=2)
    with torch.no_grad():
        for number, parameter in enumerate(pool.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number))
    weights = pool.weights
    ids = torch.tensor([[0, 1], [3, 0], [4, 4], [1, 3]] * 20)
    gates = randn(80, 2, seed=1).float().masked_fill(ids == 4, 0).requires_grad_()
    x = randn(80, 8, seed=2).float().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, gates, *weights)]
    expected = by_definition(exact[0], ids, exact[1], ExpertWeights(*exact[2:]))
    y = run("grouped", x, ids, gates, weights)
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(y, expected, **close)
    probe = randn(80, 8, seed=3)
    expected_grads = torch.autograd.grad((expected * probe).sum(), exact)
    for grad, other in zip(torch.autograd.grad((y * probe).sum(), (x, gates, *weights)), expected_grads, strict=True):
        if grad.shape == ids.shape:  # the router masks the gates of padding, and with them what comes back here
            grad = grad.masked_fill(ids == 4, 0)
        torch.testing.assert_close(grad, other, **close)


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
    assert why_not("grouped", torch.randn(3, 8), GeneralExperts(8, 4, 2).weights) is None


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
        pool.run(torch.randn(3, 8), Plan(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 1), torch.zeros(4)))
