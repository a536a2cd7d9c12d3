"""One model's whole profile, and the dense model's beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from diffmoe.model.heads import ImageClassifier
from diffmoe.model.layers import evaluating
from diffmoe.profiling.flops import Flops, count_flops
from diffmoe.profiling.parameters import Count, count_by_part
from diffmoe.profiling.parts import LOADING, Part, in_order
from diffmoe.profiling.ranges import label, ranges
from diffmoe.profiling.throughput import Contender, Draw, Speed, race
from diffmoe.profiling.timing import BACKWARD_PASS, FORWARD_PASS, Measured, measure
from diffmoe.profiling.work import Work, observe

FUSION = "fusion"
ONCE = ("data loading", "optimizer", "idle")
"""Parts of a step that are of neither pass."""


@dataclass(frozen=True)
class PartCost:
    """What one part costs in a training step on a whole batch."""

    place: str
    part: str
    parameters: int = 0
    parameters_active: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    padding_flops: int = 0
    """Both passes, over and above."""
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    once_ms: float = 0.0
    """Of what is of neither pass."""
    held_bytes: float = 0.0
    """Left by its forward for the backward pass."""

    @property
    def ms(self) -> float:
        """All of its time."""
        return self.forward_ms + self.backward_ms + self.once_ms

    @property
    def flops(self) -> int:
        """Both passes, padding apart."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Totals:
    """What a model costs as a whole; FLOPs by hand count, of products and convolutions, padding apart."""

    parameters: int
    parameters_active: int
    inference_flops: float
    """A picture."""
    training_flops: float
    """A picture, forward and backward, its share of the step's texts among them."""
    padding_flops: float
    """A picture in training: rows that only fill the experts' products up."""


@dataclass(frozen=True)
class Profile:
    """What `profile_model` found."""

    batch_size: int
    steps: int
    parts: tuple[PartCost, ...]
    totals: Totals
    dense: Totals | None
    step_ms: float
    """Median training step under the profiler; the parts' medians leave `remainder_ms` of it."""
    work: Work
    weight_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    """The most that a training step has allocated at once, over weights and optimizer state."""
    speeds: tuple[Speed, ...]

    @property
    def remainder_ms(self) -> float:
        """The step's median less the parts' medians: over 0 or under, as medians do not add up."""
        return self.step_ms - sum(cost.ms for cost in self.parts)

    def grouped(self) -> list[PartCost]:
        """The parts of both towers together, and the whole fusion as one."""
        groups: dict[str, PartCost] = {}
        for cost in self.parts:
            name = FUSION if cost.place == FUSION else cost.part
            groups[name] = _sum(groups.get(name, PartCost("", name)), cost)
        order = [cost.part for cost in self.parts if cost.place != FUSION]
        place = order.index("head") if "head" in order else len(order)
        order = list(dict.fromkeys([*order[:place], FUSION, *order[place:]]))
        return [groups[name] for name in order if name in groups]


def _sum(a: PartCost, b: PartCost) -> PartCost:
    numbers = [f.name for f in dataclasses.fields(PartCost) if f.name not in ("place", "part")]
    return dataclasses.replace(a, **{name: getattr(a, name) + getattr(b, name) for name in numbers})


def profile_model(
    moe: Contender,
    dense: Contender | None,
    draw: Draw,
    load: Iterator[Sequence[Tensor]] | None,
    batch_size: int,
    batch_sizes: Sequence[int],
    steps: int,
    trace: Path | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> Profile:
    """Count, measure and race.

    Args:
        moe: the model.
        dense: its dense twin; None where the model itself is dense.
        draw: new batches of any size.
        load: the training batches of the data, of `batch_size`, without end; None where there is no data, and so no
            time of loading it.
        batch_size: of the training step that is taken apart.
        batch_sizes: of the throughput's curve.
        steps: that are measured; medians count.
        trace: where to write a trace of two steps, in Chrome's format.
        progress: told what is being done.
    """
    progress("FLOPs")
    totals, work = count(moe, draw(batch_size))
    dense_totals = count(dense, draw(batch_size))[0] if dense is not None else None
    progress("time and memory by part")
    measured = _measure(moe, draw, load, batch_size, steps, trace)
    contenders = {"moe": moe} | ({"dense": dense} if dense is not None else {})
    if dense is None:
        contenders = {"dense": moe}
    speeds = []
    for speed in race(contenders, batch_sizes, draw, steps):
        progress(f"throughput: {speed.model}, {speed.mode}, batch {speed.batch_size}")
        speeds.append(speed)
    state: Iterable[Any] = (v for s in moe.optimizer.state.values() for v in s.values())
    return Profile(
        batch_size=batch_size,
        steps=steps,
        parts=tuple(_costs(count_by_part(moe.model), count_flops(moe.model.config, work), measured)),
        totals=totals,
        dense=dense_totals,
        step_ms=measured.step_ms,
        work=work,
        weight_bytes=sum(p.nbytes for p in moe.model.parameters()),
        optimizer_bytes=sum(v.nbytes for v in state if isinstance(v, Tensor)),
        peak_bytes=measured.peak_bytes,
        speeds=tuple(speeds),
    )


def count(contender: Contender, batch: Sequence[Tensor]) -> tuple[Totals, Work]:
    """Parameters and FLOPs of a model on a batch, and the work of a training step on it; takes one such step."""
    model = contender.model
    parameters = count_by_part(model).values()
    with _watched(model) as outputs:
        model.train()
        contender.train(batch)
        with evaluating(model), torch.inference_mode():
            classes = model.class_features() if isinstance(model, ImageClassifier) else None
            contender.infer(batch, classes)
    with contender.fabric.autocast():
        training, inference = (observe(model, batch, out, training=i == 0) for i, out in enumerate(outputs))
    trained, inferred = (count_flops(model.config, work).values() for work in (training, inference))
    size = len(batch[0])
    return (
        Totals(
            sum(c.total for c in parameters),
            sum(c.active for c in parameters),
            sum(f.forward for f in inferred) / size,
            sum(f.forward + f.backward for f in trained) / size,
            sum(f.padding_forward + f.padding_backward for f in trained) / size,
        ),
        training,
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """What the model returns within it."""
    outputs: list[dict[str, Any]] = []
    handle = model.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    try:
        yield outputs
    finally:
        handle.remove()


def _measure(
    moe: Contender, draw: Draw, load: Iterator[Sequence[Tensor]] | None, size: int, steps: int, trace: Path | None
) -> Measured:
    drawn = iter([] if load is not None else [draw(size) for _ in range(steps + 3)])

    def step() -> None:
        if load is None:
            moe.train(next(drawn))
            return
        with record_function(label(LOADING)):
            batch = next(load)
        moe.train(batch)

    moe.model.train()
    with ranges(moe.model, moe.objective, moe.fabric):
        step()
        return measure(step, steps, moe.fabric.device, trace)


def _costs(parameters: dict[Part, Count], flops: dict[Part, Flops], measured: Measured) -> list[PartCost]:
    parts = {*parameters, *flops, *(part for part, _ in measured.ms), *measured.held_bytes}
    costs = []
    for part in sorted(parts, key=in_order):
        total, active = parameters.get(part, Count(0, 0))
        counted = flops.get(part, Flops(0, 0))
        forward = measured.ms.get((part, FORWARD_PASS), 0.0)
        once = part.name in ONCE
        costs.append(
            PartCost(
                *part,
                total,
                active,
                counted.forward,
                counted.backward,
                counted.padding_forward + counted.padding_backward,
                0.0 if once else forward,
                measured.ms.get((part, BACKWARD_PASS), 0.0),
                forward if once else 0.0,
                0.0 if once else measured.held_bytes.get(part, 0.0),
            )
        )
    return costs
