"""What this machine has, and the settings that make it fast."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffmoe.config import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""
DEFAULT_THRESHOLD = 128 * 1024
"""Of both, in a fresh process."""


def pick_device(device: str) -> torch.device:
    """The device named, or for `auto` the best one here. Raises `UserError` where it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in present.items() if there)
    if not present[device]:
        raise UserError(
            f"device is {device!r}: this machine has {', '.join(n for n, there in present.items() if there)}"
        )
    return torch.device(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 itself and much faster than float32: a GPU that does not only emulate it, a
    processor with AMX.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


@contextmanager
def tuned() -> Iterator[None]:
    """Within it, the processor's settings are those that make a run fast; after it, they are as they were."""
    settings = _matmul_settings()
    former = settings.fp32_precision
    kept = keep_freed_memory()
    use_fast_matmul()
    try:
        yield
    finally:
        settings.fp32_precision = former
        if kept:
            _mallopt(DEFAULT_THRESHOLD, DEFAULT_THRESHOLD)


def keep_freed_memory() -> bool:
    """On a CPU with glibc, keep large buffers for the next step instead of giving them back; True where that is so.

    Every training step frees and asks for the same hundreds of megabytes; handing them back to the system each time
    costs a page fault for every 4 KB: 8% of the tiny preset's step (docs/dev/LOG.md).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    largest = 32 * 2**20  # glibc's own ceiling for the mmap threshold
    return _mallopt(largest, 2**31 - 1)


def _mallopt(mmap_threshold: int, trim_threshold: int) -> bool:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, mmap_threshold) and mallopt(M_TRIM_THRESHOLD, trim_threshold))


def use_fast_matmul() -> bool:
    """On a CPU, send float32 matrix products to oneDNN where that stays as exact as float32; True where it did.

    The setting is named after bfloat16, and on a CPU with AMX it would round to it; without AMX oneDNN computes in
    float32, up to twice as fast as the stock library. So what counts is the error, measured here on the spot.
    The choice depends on the processor alone, never on a timing: two runs on one machine compute alike.
    """
    settings = _matmul_settings()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator)
    w = torch.randn(512, 512, generator=generator)
    exact = x.double() @ w.double().T
    former = settings.fp32_precision

    def error() -> float:
        return (torch.nn.functional.linear(x, w).double() - exact).abs().max().item()

    stock = error()
    settings.fp32_precision = "bf16"
    if error() <= 4 * stock:
        return True
    settings.fp32_precision = former
    return False


def _matmul_settings() -> Any:
    return torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - it is there


def machine() -> dict[str, Any]:
    """What a time was measured on: without it, it says nothing."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "amx": "amx_tile" in _cpu_flags(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }


def cpu_name() -> str:
    """As its maker calls it."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return _cpu_info("flags").split()


def _cpu_info(name: str) -> str:
    """A line of Linux's description of the first processor; empty where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")
