"""Time and memory of a training step by part, measured by torch.profiler.

Forward, an operation belongs to the innermost range around it. Backward, it belongs to the part whose forward operation
made its node: torch numbers both alike. So no module is touched for it, and the parts of a step add up to the step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage] - torch exports it nowhere
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from diffmoe.profiling.parts import OPTIMIZER, OTHER, POOL, Part
from diffmoe.profiling.ranges import BACKWARD, STEP, part_of_label

FORWARD_PASS, BACKWARD_PASS = "forward", "backward"
NODE = "autograd::engine::evaluate_function: "
ACCUMULATE = f"{NODE}torch::autograd::AccumulateGrad"
EXPERT_OPERATIONS = {
    *("_RunExperts", "aten::layer_norm", "aten::addcmul", "aten::baddbmm", "aten::_grouped_mm", "aten::grouped_mm"),
    *("aten::gelu", "aten::relu", "aten::silu", "aten::dropout", "aten::native_dropout"),
}
"""What in a routed pool, but for its router, is its experts' arithmetic; the rest of it is dispatch."""

Cell = tuple[Part, str]
"""A part and a pass."""


@dataclass(frozen=True)
class Measured:
    """What the profiler saw of a step."""

    ms: Mapping[Cell, float]
    """Medians over the steps. On a CPU the time of the operations and the Python around them, on a GPU of kernels."""
    step_ms: float
    """Median of whole steps, under the profiler."""
    held_bytes: Mapping[Part, float]
    """What a part's forward leaves allocated for the backward pass, less what it freed; these add up."""
    peak_bytes: int
    """The most allocated at once in a step, over what was before it."""


def measure(step: Callable[[], object], steps: int, device: torch.device, trace: Path | None = None) -> Measured:
    """Profile `step`, which runs in `ranges`: `steps` times for the time, twice more for memory and the trace.

    Take a step before: the first one makes the optimizer's state.
    """
    timed = _profile(step, steps, device)
    cells = [by_cell(events, device) for events in split_steps(timed.events() or [])]
    wall = [event.time_range.elapsed_us() / 1000 for event in timed.events() or [] if event.name == STEP]
    ms = {cell: median(step_cells.get(cell, 0.0) for step_cells in cells) for cell in {c for s in cells for c in s}}
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    recorded = _profile(step, 2, device, memory=True)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else _peak(recorded)
    held = [held_bytes(events, device) for events in split_steps(recorded.events() or [])]
    if trace is not None:
        recorded.export_chrome_trace(str(trace))
    return Measured(ms, median(wall), held[-1], peak)


def _profile(step: Callable[[], object], steps: int, device: torch.device, memory: bool = False) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, profile_memory=memory) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
    return profiler


def _peak(profiler: profile) -> int:
    """As the allocator had it: every allocation and every release in turn."""
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    assert results is not None
    events: Any = results.events()  # the type stubs lack nbytes
    return max(accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def split_steps(events: Iterable[FunctionEvent]) -> list[list[FunctionEvent]]:
    """The events of each step, all threads', in the order in which they began."""
    hosted = sorted(
        (event for event in events if event.device_type == DeviceType.CPU),
        key=lambda event: (event.time_range.start, -event.time_range.end),
    )
    starts = [event.time_range.start for event in hosted if event.name == STEP]
    steps: list[list[FunctionEvent]] = [[] for _ in starts]
    for event in hosted:
        if (number := bisect_right(starts, event.time_range.start)) > 0:
            steps[number - 1].append(event)
    return steps


def by_cell(events: list[FunctionEvent], device: torch.device) -> dict[Cell, float]:
    """Milliseconds of each part and pass of one step, whose own range comes first; idle: no kernel ran on the GPU."""
    found: dict[Cell, float] = defaultdict(float)
    whole = events[0]
    for event, cell in _owners(events):
        if device.type == "cuda":
            found[cell] += event.self_device_time_total / 1000
        elif event.thread == whole.thread:
            found[cell] += event.self_cpu_time_total / 1000
    if device.type == "cuda":
        found[Part("", "idle"), FORWARD_PASS] = whole.time_range.elapsed_us() / 1000 - math.fsum(found.values())
    return dict(found)


def held_bytes(events: list[FunctionEvent], device: torch.device) -> dict[Part, float]:
    """Bytes that each part of the forward pass left allocated, up to where the backward pass begins."""
    held: dict[Part, float] = defaultdict(float)
    begins = min((event.time_range.start for event in events if event.name == BACKWARD), default=math.inf)
    for event, (part, _) in _owners(events):
        if event.time_range.start < begins and event.name != STEP:
            held[part] += event.self_cpu_memory_usage if device.type == "cpu" else event.self_device_memory_usage
    return dict(held)


def _owners(events: list[FunctionEvent]) -> list[tuple[FunctionEvent, Cell]]:
    """Whose each event of a step is: its parent's, unless it begins a part or is a node of the backward pass."""
    owners: dict[int, Cell] = {}
    made_by: dict[int, Part] = {}  # the number of a node -> the part that made it
    node_part = OTHER
    for event in events:
        parent = event.cpu_parent
        part, which = owners.get(id(parent), (OTHER, FORWARD_PASS))
        if event.name == BACKWARD:
            part, which = OTHER, BACKWARD_PASS
        elif event.name.startswith(NODE):
            # A gradient is added to its parameter's right after the node that computed it.
            node_part = node_part if event.name == ACCUMULATE else made_by.get(event.sequence_nr, OTHER)
            part, which = node_part, BACKWARD_PASS
        elif (own := part_of_label(event.name)) is not None:
            part = own
        elif event.name.startswith("Optimizer."):
            part = OPTIMIZER
        elif part.name == POOL:
            part = Part(part.place, "routed experts" if event.name in EXPERT_OPERATIONS else "dispatch")
        owners[id(event)] = (part, which)
        if which == FORWARD_PASS and event.sequence_nr >= 0:
            made_by[event.sequence_nr] = part  # of several with one number, the last to begin made the node
    return [(event, _without_pool(owners[id(event)])) for event in events]


def _without_pool(cell: Cell) -> Cell:
    """Between its operations a pool is dispatching."""
    (place, name), which = cell
    return (Part(place, "dispatch"), which) if name == POOL else cell
