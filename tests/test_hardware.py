"""Devices that are not there, the fast matrix product that must stay exact, and settings that end with a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe import hardware
from diffmoe.config import UserError
from diffmoe.hardware import Threads, choose_threads, keep_freed_memory, pick_device, tuned, use_fast_matmul

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


class Machine:
    """What the kernel says of a machine: cores, those that this process may use, cgroups, what the cores do."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, cores: int, allowed: int | None = None) -> None:
        self.root, self.cores, self.busy = root, cores, dict.fromkeys(range(cores), 0.0)
        self.ticks = {core: [1000, 50] for core in range(cores)}  # idle, at work
        for name, value in (("PROC", root / "proc"), ("CGROUPS", root / "cgroup")):
            monkeypatch.setattr(hardware, name, value)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(hardware.os, "cpu_count", lambda: cores)
        monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(allowed or cores)), raising=False)
        monkeypatch.setattr(hardware.torch, "get_num_threads", lambda: allowed or cores)
        monkeypatch.setattr(hardware, "time", SimpleNamespace(sleep=self.pass_on, process_time=lambda: 5.0))
        self.pass_on(0)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def pass_on(self, seconds: float) -> None:
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        for core, ticks in self.ticks.items():
            ticks[1] += round(400 * seconds * self.busy[core])
            ticks[0] += round(400 * seconds * (1 - self.busy[core]))
            user, system, stolen = ticks[1] - 30, 10, 20
            lines.append(f"cpu{core} {user} 0 {system} {ticks[0] - 5} 5 0 0 {stolen} 0 0")
        self.write("proc/stat", "\n".join([*lines, "intr 5", ""]))


class TestThreads:
    """As many as there are cores for, and a line where that is not all of them."""

    def test_an_idle_machine_is_taken_whole_without_a_word(self, tmp_path, monkeypatch):
        Machine(tmp_path, monkeypatch, cores=8)
        assert choose_threads() == Threads(8)

    @pytest.mark.parametrize(
        ("busy", "count", "told"),
        [
            ({0: 1.0}, 1, "1.0 of 2 are busy with other work"),
            ({0: 1.0, 1: 1.0}, 1, "2.0 of 2 are busy with other work"),  # one thread there must be
            ({0: 0.2, 1: 0.2}, 2, None),  # it takes more than half a core to leave one
        ],
    )
    def test_cores_at_other_work_are_left_to_it(self, tmp_path, monkeypatch, busy, count, told):
        machine = Machine(tmp_path, monkeypatch, cores=2)
        machine.busy |= busy
        found = choose_threads()
        assert found.count == count
        line = f"threads: {count} on 2 cores, as {told}; OMP_NUM_THREADS=N sets another number" if told else ""
        assert found.why == line

    def test_work_on_cores_that_are_not_this_processes_does_not_count(self, tmp_path, monkeypatch):
        machine = Machine(tmp_path, monkeypatch, cores=8, allowed=4)
        machine.busy |= dict.fromkeys(range(4, 8), 1.0)
        found = choose_threads()
        assert found.count == 4
        assert "this process may run on 4 of them" in found.why

    def test_what_this_process_does_itself_does_not_count(self, tmp_path, monkeypatch):
        """A thread of its own may still be at work: half a core's time, of the one that is busy."""
        machine = Machine(tmp_path, monkeypatch, cores=2)
        machine.busy |= {0: 1.0}
        own = iter([5.0, 5.0 + 0.6 * hardware.WATCHED_SECONDS])
        monkeypatch.setattr(hardware.time, "process_time", lambda: next(own))
        assert choose_threads() == Threads(2)

    @pytest.mark.parametrize(
        ("files", "quota"),
        [
            ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "200000 100000\n"}, 2),
            ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, None),
            ({"proc/self/cgroup": "0::/\n"}, None),
            ({}, None),
            # a group's limit holds for those inside it, whatever they say
            (
                {
                    "proc/self/cgroup": "0::/user/app\n",
                    "cgroup/user/app/cpu.max": "600000 100000\n",
                    "cgroup/user/cpu.max": "300000 100000\n",
                },
                3,
            ),
            # in a container: the path is that of the host
            ({"proc/self/cgroup": "0::/docker/0a1b\n", "cgroup/cpu.max": "400000 100000\n"}, 4),
            (
                {
                    "proc/self/cgroup": "9:memory:/x\n4:cpu,cpuacct:/docker/0a1b\n1:name=systemd:/y\n0::/\n",
                    "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                    "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                },
                2,  # and a half
            ),
            (
                {
                    "proc/self/cgroup": "1:cpu:/\n",
                    "cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                    "cgroup/cpu/cpu.cfs_period_us": "100000\n",
                },
                1,  # though it is half a one
            ),
            (
                {
                    "proc/self/cgroup": "1:cpu:/\n",
                    "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                    "cgroup/cpu/cpu.cfs_period_us": "100000\n",
                },
                None,
            ),
        ],
    )
    def test_a_quota_of_either_kind_of_cgroup_is_kept(self, tmp_path, monkeypatch, files, quota):
        machine = Machine(tmp_path, monkeypatch, cores=8)
        for name, text in files.items():
            machine.write(name, text)
        found = choose_threads()
        assert found.count == (quota or 8)
        assert ("its cgroup gives it" in found.why) == (quota is not None)

    def test_what_the_user_set_wins(self, tmp_path, monkeypatch):
        machine = Machine(tmp_path, monkeypatch, cores=2)
        machine.busy |= {0: 1.0, 1: 1.0}
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert choose_threads() == Threads(2)

    def test_where_the_kernel_does_not_tell_the_load_average_does(self, tmp_path, monkeypatch):
        """As on macOS."""
        Machine(tmp_path, monkeypatch, cores=8)
        (tmp_path / "proc" / "stat").unlink()
        monkeypatch.setattr(hardware.time, "sleep", lambda _: pytest.fail("there is nothing to watch"))
        monkeypatch.setattr(hardware.os, "getloadavg", lambda: (2.9, 0.0, 0.0))
        assert choose_threads().count == 5

    def test_end_with_the_run(self, monkeypatch):
        before = torch.get_num_threads()
        monkeypatch.setattr(hardware, "choose_threads", lambda: Threads(before + 1, "threads"))
        with tuned() as threads:
            assert torch.get_num_threads() == threads.count == before + 1
        assert torch.get_num_threads() == before
