"""Devices that are not there, the fast matrix product that must stay exact, and settings that end with a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe import hardware
from diffmoe.config import UserError
from diffmoe.hardware import keep_freed_memory, pick_device, tuned, use_fast_matmul

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


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_settings_end_with_the_run_however_it_ends(monkeypatch, error):
    """A notebook that trains computes afterwards as it did before, and gives its memory back as before."""
    thresholds: list[tuple[int, int]] = []
    monkeypatch.setattr(hardware, "_mallopt", lambda *given: thresholds.append(given) or True)
    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware, "use_fast_matmul", lambda: setattr(MATMUL, "fp32_precision", "bf16"))
    before = MATMUL.fp32_precision
    try:
        with tuned():
            assert MATMUL.fp32_precision == "bf16"
            assert thresholds == [(32 * 2**20, 2**31 - 1)]
            if error:
                raise error
    except KeyboardInterrupt:
        assert error
    assert MATMUL.fp32_precision == before
    assert thresholds[1:] == [(128 * 1024, 128 * 1024)]  # as mallopt(3) has them in a fresh process


@pytest.mark.parametrize(("system", "library"), [("darwin", ("", "")), ("linux", ("", "")), ("linux", ("musl", "1"))])
def test_memory_is_kept_with_glibc_only(monkeypatch, system, library):
    monkeypatch.setattr(hardware, "_mallopt", lambda *_: pytest.fail("there is no such function"))
    monkeypatch.setattr(hardware.sys, "platform", system)
    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: library)
    assert not keep_freed_memory()
    with tuned():
        pass


@pytest.mark.skipif(hardware.platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_glibc_takes_the_thresholds():
    with tuned():
        assert keep_freed_memory()
