"""How contenders are timed: by turns in one process, each on the same fresh inputs.

A shared machine slows all contenders of a round alike, so what holds is the ratio within a round; its median over
rounds is what the benchmarks report. No input comes twice: routing, and with it every expert's number of rows, changes
at every step, as in training.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from diffmoe.config import UserError
from diffmoe.hardware import pick_device

Contender = Callable[[Any], object]
"""One step on one input: what is timed."""

FLOAT32_PRODUCTS = {"float32": "none", "ieee": "ieee", "onednn": "bf16", "bfloat16": "none"}
"""Modes, and what each sets `torch.backends.mkldnn.matmul.fp32_precision` to. float32 is torch as it comes; onednn is
`diffmoe.hardware.use_fast_matmul` without its check (`environment` says whether it holds here); bfloat16 is autocast.
"""
GPU_MODES = ("float32", "bfloat16")
"""The others are settings of CPU libraries."""


@dataclass(frozen=True)
class Times:
    """What a race took."""

    seconds: dict[str, list[float]]
    """Of each contender, seconds a step in each round; the rounds of all contenders correspond."""

    def ms(self, name: str) -> float:
        """Median over the rounds, in milliseconds."""
        return 1000 * median(self.seconds[name])

    def p90_ms(self, name: str) -> float:
        """Nine tenths of the rounds were at most so slow, in milliseconds."""
        rounds = sorted(self.seconds[name])
        return 1000 * rounds[-(-9 * len(rounds) // 10) - 1]

    def ratio(self, name: str, base: str) -> float:
        """Time of `name` over time of `base`: the median of the rounds' ratios."""
        return median(self.ratios(name, base))

    def ratios(self, name: str, base: str) -> list[float]:
        """Time of `name` over time of `base` in each round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]


def race(contenders: dict[str, Contender], draw: Callable[[], Any], args: argparse.Namespace) -> Times:
    """Time all contenders, by turns.

    A turn is one step that is not timed, after which caches and allocator are the contender's own again, and then
    `args.steps` that are. Every contender of a round gets the very same inputs; each round begins with another one.

    Args:
        contenders: by name.
        draw: makes the input of one step; called anew for every step of a round.
        args: `rounds`, `steps`, `warmup` (rounds that do not count) and `device`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(args.warmup + args.rounds):
        inputs = [draw() for _ in range(1 + args.steps)]
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _turn(contenders[name], inputs, torch.device(args.device))
            if number >= args.warmup:
                seconds[name].append(elapsed)
    return Times(seconds)


def _turn(contender: Contender, inputs: list[Any], device: torch.device) -> float:
    contender(inputs[0])
    _synchronize(device)
    start = time.perf_counter()
    for item in inputs[1:]:
        contender(item)
    _synchronize(device)
    return (time.perf_counter() - start) / (len(inputs) - 1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def float32_products(mode: str) -> Iterator[None]:
    """The float32 matrix products of a mode, and afterwards those of before."""
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - it is there
    former = settings.fp32_precision
    settings.fp32_precision = FLOAT32_PRODUCTS[mode]
    try:
        yield
    finally:
        settings.fp32_precision = former


def autocast(mode: str, device: torch.device | str) -> torch.autocast:
    """Mixed precision where the mode is bfloat16, as `--precision bf16-mixed` has it; else nothing."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mode == "bfloat16")


def add_timing_flags(parser: argparse.ArgumentParser, *, rounds: int, steps: int, modes: tuple[str, ...]) -> None:
    """The flags that all benchmarks share; `modes` are the defaults on a CPU."""
    parser.add_argument("--modes", nargs="+", default=None, choices=FLOAT32_PRODUCTS, metavar="MODE")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of turns; medians count")
    parser.add_argument("--steps", type=int, default=steps, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the first that counts")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(cpu_modes=modes)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse, settle device, modes and threads, and seed torch. A mistake is one line and exit code 2."""
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device).type
    except UserError as error:
        parser.error(str(error))
    on_gpu = args.device == "cuda"
    cpu_modes = vars(args).pop("cpu_modes")
    args.modes = args.modes or (["bfloat16"] if on_gpu else list(cpu_modes))
    if on_gpu and (wrong := set(args.modes) - set(GPU_MODES)):
        parser.error(f"modes {', '.join(sorted(wrong))} are settings of a CPU: on a GPU take {', '.join(GPU_MODES)}")
    if min(args.rounds, args.steps) < 1:
        parser.error(f"rounds is {args.rounds}, steps {args.steps}: both must be at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args
