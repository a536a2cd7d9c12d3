"""Muon: what it makes of a matrix, a step by hand, and that a stack is moved as its matrices would be one by one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from diffmoe.training import muon
from diffmoe.training.muon import Muon, orthogonalized


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_singular_values(rows: int, columns: int, values: Tensor, seed: int) -> Tensor:
    left, right = (torch.linalg.qr(randn(n, len(values), seed=seed + n))[0] for n in (rows, columns))
    return left @ values.diag() @ right.T


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (40, 24), (24, 64)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_singular_values_become_about_one(monkeypatch, rows: int, columns: int, size: float, bfloat16: bool) -> None:
    monkeypatch.setattr(muon, "has_bfloat16", lambda _: bfloat16)
    matrix = of_singular_values(rows, columns, size * torch.logspace(0, -2, 24, dtype=torch.float64), seed=1)
    found = orthogonalized(matrix.float())
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_directions_stay() -> None:
    matrix = of_singular_values(6, 9, torch.tensor([3.0, 2.0, 1.0, 0.5]).double(), seed=2)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    between = left.T @ orthogonalized(matrix) @ right.T
    torch.testing.assert_close(between, between.diagonal().diag(), atol=1e-8, rtol=0)
    assert (between.diagonal()[:4] > 0.6).all()


@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 5, 8)])
def test_a_stack_is_its_matrices_one_by_one(shape: tuple[int, ...]) -> None:
    stack = randn(*shape) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)  # none is loud or quiet for another's sake
    torch.testing.assert_close(orthogonalized(stack), torch.stack([orthogonalized(matrix) for matrix in stack]))


def test_nothing_stays_nothing() -> None:
    assert not orthogonalized(torch.zeros(2, 4, 3)).any()


RATE, DECAY, MOMENTUM = 0.1, 0.3, 0.9


def by_hand(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """Steps on one matrix, from the formulas, with the exact U V' in the place of Newton-Schulz."""
    weight, mean = weight.clone(), torch.zeros_like(weight)
    for gradient in gradients:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient
        left, _, right = torch.linalg.svd(MOMENTUM * mean + (1 - MOMENTUM) * gradient, full_matrices=False)
        larger = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        weight = (1 - RATE * DECAY) * weight - RATE * larger * left @ right
    return weight


def exact(matrices: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left @ right


def make(*weights: Tensor) -> tuple[list[nn.Parameter], Muon]:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    group = {"params": parameters, "lr": RATE, "weight_decay": DECAY, "momentum": MOMENTUM}
    return parameters, Muon([group], fused=True)


def steps(parameter: nn.Parameter, optimizer: Muon, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.view_as(parameter).clone()
        optimizer.step()
        assert parameter.grad is None  # AdamW does not move it too


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_a_step_is_its_formula(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(muon, "orthogonalized", exact)
    (parameter,), optimizer = make(randn(*shape))
    gradients = [randn(*shape, seed=seed) for seed in (1, 2, 3)]
    expected = by_hand(parameter.detach(), gradients)
    steps(parameter, optimizer, gradients)
    torch.testing.assert_close(parameter.detach(), expected)


def test_a_convolution_is_a_matrix_of_its_output_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "orthogonalized", exact)
    (parameter,), optimizer = make(randn(5, 2, 3, 3))
    gradients = [randn(5, 18, seed=seed) for seed in (1, 2)]
    expected = by_hand(parameter.detach().flatten(1), gradients)
    steps(parameter, optimizer, gradients)
    torch.testing.assert_close(parameter.detach().flatten(1), expected)


def test_stacked_experts_are_moved_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "orthogonalized", exact)
    (parameter,), optimizer = make(randn(3, 6, 4))
    gradients = [randn(3, 6, 4, seed=seed) for seed in (1, 2)]
    before = parameter.detach().clone()
    steps(parameter, optimizer, gradients)
    for number, expert in enumerate(before):
        expected = by_hand(expert, [gradient[number] for gradient in gradients])
        torch.testing.assert_close(parameter.detach()[number], expected)


def test_what_has_no_gradient_stays() -> None:
    parameters, optimizer = make(randn(4, 4), randn(4, 4, seed=1))
    parameters[0].grad = randn(4, 4, seed=2)
    optimizer.step()
    assert torch.equal(parameters[1].detach(), randn(4, 4, seed=1))
    assert not torch.equal(parameters[0].detach(), randn(4, 4))


def mixed(seed: int) -> tuple[list[nn.Parameter], Muon]:
    matrix, bias = (nn.Parameter(randn(*shape, seed=seed).float()) for shape in ((4, 6), (5,)))
    groups = [
        {"params": [bias], "lr": 0.01, "weight_decay": 0.0},
        {"params": [matrix], "lr": RATE, "weight_decay": DECAY, "momentum": MOMENTUM},
    ]
    return [matrix, bias], Muon(groups, lr=1.0, betas=(0.9, 0.98), fused=True)


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        for parameter in parameters:
            parameter.grad = randn(*parameter.shape, seed=seed).float()
        optimizer.step()


def test_the_other_groups_are_adamws() -> None:
    (_, bias), _ = both = mixed(0)
    train(*both, range(3))
    alone = nn.Parameter(randn(5).float())
    adamw = torch.optim.AdamW([alone], lr=0.01, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    train([alone], adamw, range(3))
    assert torch.equal(bias, alone)


def test_saved_and_put_back_it_goes_on_bit_for_bit() -> None:
    parameters, optimizer = mixed(0)
    train(parameters, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, other = mixed(7)
    with torch.no_grad():
        for one, value in zip(resumed, copy.deepcopy(parameters), strict=True):
            one.copy_(value)
    other.load_state_dict(torch.load(file, weights_only=True))
    for both in ((parameters, optimizer), (resumed, other)):
        train(*both, range(3, 6))
    assert all(torch.equal(one, value) for one, value in zip(resumed, parameters, strict=True))
