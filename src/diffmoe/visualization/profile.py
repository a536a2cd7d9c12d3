"""Figures of what a model costs: pure functions of the rows of a profile's JSON, `grouped` and `throughput`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffmoe.visualization import style
from diffmoe.visualization.colors import BLUE, GREEN, SKY, VERMILLION, theme
from diffmoe.visualization.language import say


@style.styled()
def costs_by_part(costs: Sequence[Mapping[str, Any]]) -> Figure:
    """How to read it: the longest bars cost most; long in time and short in FLOPs is what moves data or waits."""
    looks = (
        *(("forward", say("forward"), BLUE), ("backward", say("backward"), SKY)),
        *(("once", say("once a step"), theme().muted), ("held", say("held for the backward pass"), GREEN)),
    )
    units = (("flops", 1e6, say("MFLOPs")), ("ms", 1, say("milliseconds")), ("bytes", 1e6, say("megabytes")))
    figure, rows = Figure(figsize=(10, 0.27 * len(costs) + 1.2), layout="constrained"), range(len(costs))
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (unit, scale, title) in zip(panels, units, strict=True):
        ends = np.zeros(len(costs))
        for name, label, color in looks:
            values = np.array([cost.get(f"{name}_{unit}", 0) for cost in costs]) / scale
            axes.barh(rows, values, left=ends, color=color, label=label)
            ends += values
        shares = [f"{end / ends.sum():.1%}" if end else "" for end in ends]
        axes.bar_label(axes.containers[-1], shares, padding=3, fontsize=style.SMALL)
        low, room = min(0, *ends), 0.2 * (max(ends) - min(0, *ends))
        axes.set(xlabel=title, xlim=(low - (room if low else 0), max(ends) + room))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    panels[0].set(yticks=rows, yticklabels=[_title(cost["part"]) for cost in costs], ylim=(len(costs) - 0.4, -0.6))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


@style.styled()
def throughput(speeds: Sequence[Mapping[str, Any]]) -> Figure:
    """How to read it: pictures a second rise with the batch until the machine is full."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    looks = [("moe", say("mixture of experts"), BLUE), ("dense", say("dense model"), VERMILLION)]
    panels, modes = figure.subplots(1, 2), {"inference": say("Inference"), "training": say("Training")}
    for axes, (mode, title) in zip(panels, modes.items(), strict=True):
        for model, label, color in looks:
            if line := [speed for speed in speeds if (speed["model"], speed["mode"]) == (model, mode)]:
                sizes = [str(speed["batch_size"]) for speed in line]
                axes.plot(sizes, [speed["images_per_second"] for speed in line], marker="o", color=color, label=label)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set(title=title, xlabel=say("pictures in a batch"), ylim=0)
    panels[0].set_ylabel(say("pictures a second"))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _title(part: str) -> str:
    titles = (
        *(say("data loading"), say("patch embedding"), say("text embedding"), say("attention"), say("router")),
        *(say("routed experts"), say("global expert"), say("modality expert"), say("cross-attention"), say("head")),
        *(say("other"), say("losses"), say("optimizer")),
    )
    assert say(part) in titles, part
    return say(part)
