"""Figures of what a model costs: pure functions of `profiling`'s outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from diffmoe.profiling.profile import PartCost
from diffmoe.profiling.throughput import Speed, ratio
from diffmoe.visualization import style
from diffmoe.visualization.language import say
from diffmoe.visualization.style import styled

FORWARD, BACKWARD, ONCE = style.BLUE, style.SKY, style.MUTED
MOE, DENSE = style.BLUE, style.VERMILLION
ROW = 0.27
"""Inches of a part's row."""


@styled()
def time_by_part(costs: Sequence[PartCost]) -> Figure:
    """How to read it: the longest bars are where a training step's time goes; dark is forward, light is backward.

    `costs`: of `Profile.grouped()`; milliseconds of a step, and each part's share of all of them.
    """
    shown = _with(costs, [cost.ms for cost in costs])
    figure, axes = _rows(shown)
    rows = np.arange(len(shown))
    forward, backward = (np.array([getattr(c, f"{way}_ms") for c in shown]) for way in ("forward", "backward"))
    once = np.array([cost.once_ms for cost in shown])
    axes.barh(rows, forward, color=FORWARD, label=say("forward"), zorder=2)
    axes.barh(rows, backward, left=forward, color=BACKWARD, label=say("backward"), zorder=2)
    if once.any():
        axes.barh(rows, once, left=forward + backward, color=ONCE, label=say("once a step"), zorder=2)
    _write_shares(axes, [cost.ms for cost in shown])
    axes.set(xlabel=say("milliseconds of a training step"), title=say("Time by part"))
    _legend_above(axes)
    return figure


@styled()
def memory_by_part(costs: Sequence[PartCost]) -> Figure:
    """How to read it: what a part's forward leaves in memory until the backward pass; the longest fill the memory.

    `costs`: of `Profile.grouped()`; a part that frees what another one made can be below 0.
    """
    shown = _with(costs, [cost.held_bytes for cost in costs])
    figure, axes = _rows(shown)
    megabytes = [cost.held_bytes / 1e6 for cost in shown]
    axes.barh(np.arange(len(shown)), megabytes, color=FORWARD, zorder=2)
    axes.axvline(0, color=style.MUTED, linewidth=0.8)
    _write_shares(axes, megabytes)
    axes.set(xlabel=say("megabytes held for the backward pass"), title=say("Memory by part"))
    return figure


@styled()
def flops_against_time(costs: Sequence[PartCost]) -> Figure:
    """How to read it: a part whose time is right of its FLOPs costs more than its arithmetic, moving data for example.

    `costs`: of `Profile.grouped()`; shares of all FLOPs and of all time of a training step, forward and backward.
    """
    times, flops = (np.array([value(cost) for cost in costs], float) for value in (lambda c: c.ms, lambda c: c.flops))
    shown = _with(costs, list(times + flops))
    kept = [costs.index(cost) for cost in shown]
    time_shares, flop_shares = times[kept] / times.sum(), flops[kept] / flops.sum()
    figure, axes = _rows(shown)
    rows = np.arange(len(shown))
    axes.hlines(rows, flop_shares, time_shares, color=style.MUTED, linewidth=2, zorder=2)
    mark: dict[str, Any] = {"linestyle": "", "clip_on": False, "zorder": 3}
    axes.plot(flop_shares, rows, marker="o", color=style.BLUE, markersize=8, label=say("FLOPs"), **mark)
    axes.plot(time_shares, rows, marker="D", color=style.ORANGE, markersize=4.5, label=say("time"), **mark)
    longest = max(time_shares.max(), flop_shares.max())
    axes.set_xlim(-0.025 * longest, 1.05 * longest)
    axes.xaxis.set_major_formatter(style.percent_tick)
    axes.set(xlabel=say("share of a training step"), title=say("FLOPs and time by part"))
    _legend_above(axes)
    return figure


@styled()
def throughput(speeds: Sequence[Speed]) -> Figure:
    """How to read it: pictures a second rise with the batch until the machine is full; below 1, experts are faster.

    `speeds` of a model and, where there is one, of the dense model beside it, measured by turns; medians. The lower
    panels have the experts' time over the dense model's, with the spread of the middle half of the rounds.
    """
    names = list(dict.fromkeys(speed.model for speed in speeds))
    rows = 2 if len(names) > 1 else 1
    figure = Figure(figsize=(8, 2.9 + 1.7 * (rows - 1)), layout="constrained")
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False, height_ratios=[3, 1.6][:rows])
    for column, mode in enumerate(("inference", "training")):
        of_mode = [speed for speed in speeds if speed.mode == mode]
        by_model = {name: [speed for speed in of_mode if speed.model == name] for name in names}
        axes: Axes = panels[0, column]
        for name, line in by_model.items():
            look: dict[str, Any] = {"color": MOE} if name == "moe" else {"color": DENSE, "linestyle": "--"}
            label = {"moe": say("mixture of experts"), "dense": say("dense, equal active compute")}[name]
            sizes = [speed.batch_size for speed in line]
            axes.plot(sizes, [speed.images_per_second for speed in line], marker="o", label=label, **look)
        axes.set_title({"inference": say("Inference"), "training": say("Training")}[mode])
        axes.set_ylim(0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if rows == 2:
            _ratio_panel(panels[1, column], by_model["moe"], by_model["dense"])
        _batch_axis(panels[-1, column], sorted({speed.batch_size for speed in of_mode}))
    panels[0, 0].set_ylabel(say("pictures a second"))
    if rows == 2:
        panels[1, 0].set_ylabel(say("time over dense"))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _ratio_panel(axes: Axes, moe: Sequence[Speed], dense: Sequence[Speed]) -> None:
    sizes = [speed.batch_size for speed in moe]
    ratios = [ratio(a, b) for a, b in zip(moe, dense, strict=True)]
    rounds = [[x / y for x, y in zip(a.seconds, b.seconds, strict=True)] for a, b in zip(moe, dense, strict=True)]
    quarters = [np.quantile(values, (0.25, 0.75)) for values in rounds]
    axes.vlines(sizes, *zip(*quarters, strict=True), color=MOE, alpha=0.35, linewidth=4)
    axes.plot(sizes, ratios, marker="o", color=MOE)
    axes.axhline(1, color=DENSE, linestyle="--")
    axes.set_ylim(0, 1.25 * max(1.0, max(high for _, high in quarters)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _batch_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
    axes.set_xlabel(say("pictures in a batch"))


@styled()
def cost_table(costs: Sequence[PartCost], batch_size: int) -> Figure:
    """How to read it: a row is a part; FLOPs are a picture's in training, time and memory those of a whole batch.

    `costs`: of `Profile.grouped()`, from a step of `batch_size` pictures.
    """
    header = [
        *(say("part"), say("parameters"), say("active"), say("MFLOPs forward"), say("MFLOPs backward")),
        *(say("ms forward"), say("ms backward"), say("ms in all"), say("MB held")),
    ]
    lines = [[part_title(cost.part), *numbers_of(cost, batch_size)] for cost in costs]
    widths = [max(style.inches(line[i], style.SMALL) for line in (header, *lines)) + 0.2 for i in range(len(header))]
    width, height = sum(widths) + 0.2, ROW * (len(lines) + 1) + 0.2
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    ends = 0.1 + np.cumsum(widths)
    for row, line in enumerate((header, *lines)):
        middle = 0.1 + ROW * (row + 0.5)
        for column, text in enumerate(line):
            place = (0.1, middle) if column == 0 else (ends[column] - 0.05, middle)
            color = style.MUTED if row == 0 else style.INK
            side = "left" if column == 0 else "right"
            axes.text(*place, text, ha=side, va="center_baseline", fontsize=style.SMALL, color=color)
        axes.axhline(0.1 + ROW * (row + 1), 0.1 / width, 1 - 0.1 / width, color=style.GRID, linewidth=0.7)
    return figure


def numbers_of(cost: PartCost, batch_size: int) -> list[str]:
    """The numbers of a part's row, as they are written; empty for a part that has none of a kind."""
    millions = (cost.forward_flops / batch_size / 1e6, cost.backward_flops / batch_size / 1e6)
    counts = (cost.parameters, cost.parameters_active)
    milliseconds = (cost.forward_ms, cost.backward_ms, cost.ms)
    return [
        *(f"{value:,}" if value else "" for value in counts),
        *(f"{value:,.3f}" if value else "" for value in millions),
        *(f"{value:,.2f}" if value else "" for value in milliseconds),
        f"{cost.held_bytes / 1e6:,.2f}" if cost.held_bytes else "",
    ]


def part_title(name: str) -> str:
    """A part's name in the current language."""
    return {
        "data loading": say("data loading"),
        "patch embedding": say("patch embedding"),
        "text embedding": say("text embedding"),
        "attention": say("attention"),
        "router": say("router"),
        "dispatch": say("dispatch"),
        "routed experts": say("routed experts"),
        "global expert": say("global expert"),
        "modality expert": say("modality expert"),
        "residual": say("residual sums"),
        "fusion": say("fusion"),
        "head": say("head"),
        "losses": say("losses"),
        "optimizer": say("optimizer"),
        "idle": say("GPU idle"),
        "other": say("other"),
    }[name]


def _with(costs: Sequence[PartCost], values: Sequence[float]) -> list[PartCost]:
    """The parts that have a value."""
    shown = [cost for cost, value in zip(costs, values, strict=True) if value]
    if not shown:
        raise ValueError("there is nothing to draw")
    return shown


def _rows(costs: Sequence[PartCost]) -> tuple[Figure, Axes]:
    """A figure with a row for each part, the first on top."""
    figure = Figure(figsize=(7, ROW * len(costs) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(costs)), [part_title(cost.part) for cost in costs])
    axes.set_ylim(len(costs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _legend_above(axes: Axes) -> None:
    """Where no bar ever is."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)


def _write_shares(axes: Axes, values: Sequence[float]) -> None:
    """Each bar's share of them all, behind it."""
    whole, longest = sum(values), max(values)
    for row, value in enumerate(values):
        share = f"{value / whole:.1%}"
        axes.annotate(
            share, (max(value, 0), row), (4, 0), textcoords="offset points", va="center_baseline", fontsize=style.SMALL
        )
    axes.set_xlim(min(0, *values), 1.12 * longest)
