"""What this machine has, and the settings that make it fast."""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

import torch
from lightning_fabric import Fabric

from diffmoe.config import RunConfig, UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""


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


def make_fabric(run: RunConfig) -> Fabric:
    """A launched Fabric: device, processes, precision."""
    device = pick_device(run.device)
    num_present = torch.cuda.device_count() if device.type == "cuda" else run.num_devices
    if run.num_devices > num_present:
        raise UserError(f"num_devices is {run.num_devices}: this machine has {num_present}")
    precision = run.precision
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16-mixed" if has_bf16 else "32-true"
    fabric = Fabric(accelerator=device.type, devices=run.num_devices, strategy=run.strategy, precision=precision)
    fabric.launch()
    return fabric


def keep_freed_memory() -> bool:
    """On a CPU with glibc, keep large buffers for the next step instead of giving them back; True where that is so.

    Every training step frees and asks for the same hundreds of megabytes; handing them back to the system each time
    costs a page fault for every 4 KB: 8% of the tiny preset's step (docs/dev/LOG.md).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    largest = 32 * 2**20  # glibc's own ceiling for the mmap threshold
    return bool(mallopt(M_MMAP_THRESHOLD, largest) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def use_fast_matmul() -> bool:
    """On a CPU, send float32 matrix products to oneDNN where that stays as exact as float32; True where it did.

    The setting is named after bfloat16, and on a CPU with AMX it would round to it; without AMX oneDNN computes in
    float32, up to twice as fast as the stock library. So what counts is the error, measured here on the spot.
    The choice depends on the processor alone, never on a timing: two runs on one machine compute alike.
    """
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - it is there
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
