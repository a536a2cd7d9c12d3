"""What this machine has, and the settings that make it fast."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from diffmoe.config import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""
DEFAULT_THRESHOLD = 128 * 1024
"""Of both, in a fresh process."""
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
WATCHED_SECONDS = 0.25
"""Long enough to see which cores are busy: 25 of the kernel's ticks."""


@dataclass(frozen=True)
class Threads:
    """How many threads torch computes with."""

    count: int
    why: str = ""
    """Where they are fewer than the cores: in a line."""


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


def choose_threads() -> Threads:
    """As many threads as there are cores for them: those that this process may use, less those at other work.

    All threads wait for the last one at the end of every operation, and one that must wait for a core makes them all
    wait: on a busy machine fewer are faster. Where the user set OMP_NUM_THREADS, that holds.
    """
    most, cores = torch.get_num_threads(), os.cpu_count() or 1
    if "OMP_NUM_THREADS" in os.environ or most == 1 == cores:
        return Threads(most)
    allowed, quota = _allowed_cores(cores), _quota()
    busy = _busy_cores(allowed)
    limits = {
        f"this process may run on {len(allowed)} of them": len(allowed),
        f"its cgroup gives it {quota:g} of them": math.floor(min(quota, cores)),
        f"{busy:.1f} of {len(allowed)} are busy with other work": round(len(allowed) - busy),
    }
    reason = min(limits, key=lambda each: limits[each])
    wanted = most if len(allowed) == cores else cores  # torch knows what a process may run on, and nothing of the rest
    if limits[reason] >= wanted:
        return Threads(most)
    count = max(1, min(most, limits[reason]))
    return Threads(count, f"threads: {count} on {cores} cores, as {reason}; OMP_NUM_THREADS=N sets another number")


@contextmanager
def tuned() -> Iterator[Threads]:
    """Within it, the processor's settings are those that make a run fast; after it, they are as they were."""
    settings = _matmul_settings()
    former, former_threads = settings.fp32_precision, torch.get_num_threads()
    kept = keep_freed_memory()
    use_fast_matmul()
    threads = choose_threads()
    torch.set_num_threads(threads.count)
    try:
        yield threads
    finally:
        torch.set_num_threads(former_threads)
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


def _allowed_cores(cores: int) -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(cores))


def _quota() -> float:
    """Cores' worth of time that the cgroups of this process leave it; infinite where they do not limit it.

    cgroup v2: `cpu.max` holds "quota period"; v1: `cpu.cfs_quota_us` and `cpu.cfs_period_us`, -1 is no limit. A group's
    limit holds for those inside it. In a container the path is that of the host, and the files are at the top.
    """
    limits = [math.inf]
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        mounts = [""] if not controllers else [controllers, "cpu"] if "cpu" in controllers.split(",") else []
        group = PurePosixPath(path.lstrip("/"))
        for folder in (CGROUPS / mount / each for mount in mounts for each in (group, *group.parents)):
            words = " ".join(_lines(folder / "cpu.max")).split()
            words = words or [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
            if len(words) == 2 and words[0] not in ("max", "-1"):
                limits.append(int(words[0]) / int(words[1]))
    return min(limits)


def _busy_cores(allowed: set[int]) -> float:
    """How many of these cores are at other work just now.

    Watched for a moment: the load average still counts what ended a minute ago, such as this program's installation.
    Where the system does not tell (macOS), it has to do.
    """
    (worked, passed), own = _ticks(allowed), time.process_time()
    if not passed:
        return min(os.getloadavg()[0], len(allowed))
    time.sleep(WATCHED_SECONDS)
    worked_by_now, passed_by_now = _ticks(allowed)
    own = (time.process_time() - own) / WATCHED_SECONDS
    share = (worked_by_now - worked) / max(1, passed_by_now - passed)
    return max(0.0, len(allowed) * share - own)


def _ticks(allowed: set[int]) -> tuple[int, int]:
    """The kernel's ticks in which these cores worked, and all of them; 0 where it does not tell."""
    worked = passed = 0
    for line in _lines(PROC / "stat"):
        name, *fields = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in allowed:
            user, nice, system, idle, waiting, *stolen = map(int, fields[:8])  # guests count as user
            worked += user + nice + system + sum(stolen)
            passed += user + nice + system + sum(stolen) + idle + waiting
    return worked, passed


def _lines(path: Path) -> list[str]:
    """None where there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def machine() -> dict[str, Any]:
    """What a time was measured on: without it, it says nothing."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "amx": has_bfloat16(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }


def cpu_name() -> str:
    """As its maker calls it."""
    names = (line.partition(":")[2].strip() for line in _lines(PROC / "cpuinfo") if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
