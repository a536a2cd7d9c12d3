"""Devices that are not there, and the fast matrix product that must stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe.config import RunConfig, UserError
from diffmoe.hardware import make_fabric, pick_device, use_fast_matmul

MATMUL: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - it is there


def hide_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_absent_device_names_those_that_are_there(monkeypatch, device):
    hide_accelerators(monkeypatch)
    with pytest.raises(UserError, match=rf"^device is '{device}': this machine has cpu$"):
        pick_device(device)


def test_auto_takes_the_best_there_is(monkeypatch):
    hide_accelerators(monkeypatch)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_fabric_on_a_cpu_computes_in_float32():
    fabric = make_fabric(RunConfig(device="cpu"))
    assert (fabric.device.type, fabric.world_size) == ("cpu", 1)
    model = fabric.setup(torch.nn.Linear(3, 2))
    assert model(torch.zeros(1, 3)).dtype == torch.float32


def test_more_gpus_than_there_are_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^num_devices is 3: this machine has 2$"):
        make_fabric(RunConfig(device="cuda", num_devices=3))


def worst_error(shape: tuple[int, int, int], seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    m, k, n = shape
    x, w = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    return (F.linear(x, w).double() - x.double() @ w.double().T).abs().max().item()


@pytest.mark.parametrize("shape", [(256, 128, 384), (64, 512, 100), (100, 33, 7)])
def test_fast_matmul_is_as_exact_as_float32(shape):
    stock = worst_error(shape, seed=1)
    use_fast_matmul()
    assert worst_error(shape, seed=1) <= 4 * stock


def test_fast_matmul_that_rounds_is_left_off(monkeypatch):
    """As on a processor with AMX, where the same setting means bfloat16."""
    linear = F.linear

    def rounding(x: Tensor, w: Tensor) -> Tensor:
        return linear(x.bfloat16().float(), w) if MATMUL.fp32_precision == "bf16" else linear(x, w)

    before = MATMUL.fp32_precision
    monkeypatch.setattr(F, "linear", rounding)
    assert not use_fast_matmul()
    assert MATMUL.fp32_precision == before


def test_fast_matmul_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    use_fast_matmul()
    assert torch.equal(torch.get_rng_state(), state)
