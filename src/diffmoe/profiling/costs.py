"""What each part of a model costs in a training step: parameters, FLOPs, time and memory."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import groupby, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.model.experts import ExpertWeights
from diffmoe.model.heads import Head
from diffmoe.model.layers import evaluating
from diffmoe.model.moe import routed_pools
from diffmoe.model.outputs import TextFeatures
from diffmoe.model.routing import Plan
from diffmoe.profiling.parts import METHODS, ORDER, count_by_part, module_parts
from diffmoe.profiling.throughput import Batch, Contender

FORWARD, BACKWARD, ONCE = "forward", "backward", "once"  # passes; once: what is of neither
Cell = tuple[str, str]  # a part and a pass
OUTSIDE: Cell = ("outside", ONCE)


class Tracker(ExitStack):
    """Within it, `watch` hears at every change which part is at work from now on, and in which pass.

    Forward, a part works while its module runs. Backward, a node of autograd's graph is work of the part that ran when
    the node was made, which its number tells; what checkpointing computes again is of the part that it computes. So
    each moment is of one part, where torch's `ModuleTracker` takes all experts that read one tensor to work at once.
    """

    def __init__(self, contender: Contender) -> None:
        super().__init__()
        self.watch: Callable[[Cell], object] = lambda _: None
        self._running, self._pass, self._cell = ["other"], ONCE, OUTSIDE
        self._made: list[tuple[int, str]] = []  # forward: from which number on nodes are of which part
        parts = {contender.objective.module: "losses", **dict(module_parts(contender.model))}
        self.callback(register_module_forward_pre_hook(lambda module, _: self._turn(parts.get(module, "other"))).remove)
        # always_call: gradient checkpointing leaves a module by an exception once it has what it needs.
        self.callback(register_module_forward_hook(lambda *_: self._turn(None), always_call=True).remove)
        methods = [(m, name, partial(self._run, METHODS[name])) for m in parts for name in METHODS if hasattr(m, name)]
        for owner, name, around in (*methods, (contender.fabric, "backward", self._backward)):
            setattr(owner, name, partial(around, getattr(owner, name)))
            self.callback(delattr, owner, name)

    def begin(self, part: str, which: str, *_: object) -> None:
        """From here on it is this part's work, but for that of modules within."""
        self._running, self._pass = [], which
        self._turn(part)

    def _turn(self, part: str | None) -> None:
        """A part begins within the one that runs, or (None) that one ends."""
        self._running.append(part) if part else self._running.pop()
        if self._pass == FORWARD:
            self._made.append((torch.autograd._get_sequence_nr(), self._running[-1]))  # pyright: ignore
        if self._cell != (self._running[-1], self._pass):
            self._cell = (self._running[-1], self._pass)
            self.watch(self._cell)

    def _run(self, part: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._turn(part)
        try:
            return method(*args, **kwargs)
        finally:
            self._turn(None)

    def _backward(self, backward: Callable[[Tensor], None], loss: Tensor) -> None:
        self.begin(*OUTSIDE)  # walking the graph is no work of the step
        numbers, parts = zip(*self._made, strict=True)
        self._made, seen, waiting = [], set[Any](), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            # A parameter's own node adds up its gradient, right after the node that the gradient comes from.
            if node is not None and node not in seen and not hasattr(node, "variable"):
                seen.add(node)
                waiting += [before for before, _ in node.next_functions]
                part = parts[bisect_right(numbers, node._sequence_nr()) - 1]
                node.register_prehook(partial(self.begin, part, BACKWARD))
        self.begin("other", BACKWARD)
        with torch.autograd.set_multithreading_enabled(False):  # a range of the trace begins and ends in one thread
            backward(loss)
        self.begin("optimizer", ONCE)


def measure(contender: Contender, draw: Callable[[], Batch], loads: bool, steps: int) -> tuple[list, int, profile]:
    """Take training steps apart: one for the FLOPs, `steps` for the time, one for memory and the trace.

    `loads`: `draw` is work of the step. Returns a row for each part, peak bytes over those before a step, its trace.
    """
    with Tracker(contender) as tracker:

        def step() -> None:
            tracker.begin(*(("data loading", ONCE) if loads else OUTSIDE))
            batch = draw()
            tracker.begin("other", FORWARD)
            contender.train(batch)
            tracker.begin(*OUTSIDE)
            contender.wait()

        with flop_counter() as counter:
            flops = _spent(tracker, step, counter.get_total_flops)
        step()  # warms up
        clock = _clock(contender.fabric.device)
        timed = sorted((_spent(tracker, step, *clock) for _ in range(steps)), key=Counter.total)
        middle = timed[steps // 4 : steps - steps // 4]  # means over the middle half: unlike medians these add up
        held, peak, trace = _memory(tracker, step, contender.fabric.device)
    ms, counts, rows = sum(middle, Counter()), count_by_part(contender.model), []
    for part in sorted({*counts, *held, *(part for part, _ in ms)}, key=lambda part: ORDER.index(part.split("/")[-1])):
        place, _, name = part.rpartition("/")
        total, active = counts.get(part, (0, 0))
        row = {"place": place, "part": name, "parameters": total, "parameters_active": active}
        worked = {f"{which}_flops": flops[part, which] for which in (FORWARD, BACKWARD)}
        times = {f"{which}_ms": ms[part, which] / len(middle) for which in (FORWARD, BACKWARD, ONCE)}
        rows.append(row | worked | times | {"ms": sum(times.values()), "held_bytes": held[part]})
    return rows, peak, trace


def grouped(rows: list[dict]) -> list[dict]:
    """The parts of one name, which follow each other, together."""
    groups = [(name, [*group]) for name, group in groupby(rows, key=lambda row: row["part"])]
    return [{"part": name} | {key: sum(row[key] for row in group) for key in [*rows[0]][2:]} for name, group in groups]


def flop_counter() -> FlopCounterMode:
    """Torch's own, which knows no grouped_mm: each row of (P, K) meets one of (E, K, N), in the gradient likewise."""
    formulas = {torch.ops.aten._grouped_mm: lambda rows, stack, *_, **__: 2 * prod(rows) * stack[-1]}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def flops_per_image(model: Head, draw: Callable[[int], Batch]) -> int:
    """Forward FLOPs of one more picture in a batch, up to the answer, by the counter; `draw` makes a batch of a size.

    Of a routed pool the slots that have an expert count, and no row that only fills a product up.
    """
    pools = list(routed_pools(model).values())
    dispatches = [pool.dispatch for pool in pools]
    with evaluating(model), torch.no_grad():
        classes = model.class_features()
        try:
            for pool in pools:
                pool.dispatch = _exactly_the_slots  # pyright: ignore[reportAttributeAccessIssue]
            one, two = (_forward_flops(model, draw(size), classes) for size in (1, 2))
        finally:
            for pool, dispatch in zip(pools, dispatches, strict=True):
                pool.dispatch = dispatch
    return two - one


def _exactly_the_slots(x_TD: Tensor, plan: Plan, weights: ExpertWeights, *_: Any) -> Tensor:
    """What the slots of a plan cost, through the first expert, as all are alike; a result that means nothing."""
    slots = x_TD.new_zeros(int(plan.tokens_per_expert.sum()), x_TD.shape[1])
    F.linear(F.linear(slots, weights.fc1_weight[0]), weights.fc2_weight[0])
    return x_TD


def _forward_flops(model: Head, batch: Batch, classes: TextFeatures | None) -> int:
    with flop_counter() as counter:
        model.answer(batch, classes=classes)
    return counter.get_total_flops()


def _spent(tracker: Tracker, step: Callable[[], None], read: Callable[[], Any], minus: Any = int.__sub__) -> Counter:
    """By part and pass, what a step adds to what `read` reads, from each change of the tracker to the next."""
    readings: list[tuple[Cell, Any]] = []
    tracker.watch = lambda cell: readings.append((cell, read()))
    step()
    spent: Counter[Cell] = Counter()
    for (cell, before), (_, after) in pairwise(readings):
        spent[cell] += minus(after, before)
    del spent[OUTSIDE]
    return spent


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Reads the time, and the milliseconds between two readings: on a GPU in its queue, of kernels, not of launches."""
    if device.type != "cuda":
        return time.perf_counter, lambda after, before: 1000 * (after - before)
    record = torch.cuda.current_stream(device).record_event
    return lambda: record(torch.cuda.Event(enable_timing=True)), lambda after, before: before.elapsed_time(after)


def _memory(tracker: Tracker, step: Callable[[], None], device: torch.device) -> tuple[Counter[str], int, profile]:
    """Bytes that each part's forward leaves allocated, the most at once, and the profiler: its trace has the parts."""
    running, prefix = ExitStack(), "diffmoe/"

    def watch(cell: Cell) -> None:
        running.close()
        running.enter_context(record_function(f"{prefix}{cell[1]}/{cell[0]}"))

    tracker.watch = watch
    with profile(profile_memory=True, acc_events=True) as profiler, running:
        step()
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    held, which, part, now, peak = Counter[str](), "", "", 0, 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        where, name = event.device_type().name.lower(), event.name()
        if where == "cpu" and name.startswith(prefix):
            which, _, part = name.removeprefix(prefix).partition("/")
        elif where == device.type and name == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
            if which == FORWARD:
                held[part] += event.nbytes()
    return held, peak, profiler
