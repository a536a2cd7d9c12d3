"""Figures of a comparison: pure functions of what its JSON holds, and of the routers' health epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from diffmoe.visualization import style
from diffmoe.visualization.colors import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, theme
from diffmoe.visualization.language import say

SHARES = ("test_accuracy", "test_accuracy_tta", "i2t_r1", "t2i_r1")
"""Metrics that are shares, from 0 to 1."""
MARKERS = "osD^vP"
Health = Sequence[Sequence[Mapping[str, float]]]
"""Of each run of an arm, rows as `evaluation.history.router_health` has them."""


COLORS = (BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE)
"""Of arms, in their order."""


def metric_name(metric: str) -> str:
    """As a reader calls it."""
    known = {"test_accuracy": say("test accuracy"), "test_accuracy_tta": say("test accuracy, mean over views")}
    return known.get(metric, metric)


@style.styled()
def score_against_cost(arms: Mapping[str, Mapping[str, Any]], metric: str) -> Figure:
    """How to read it: higher is better, further left is cheaper; bars are a standard deviation over seeds, dots seeds.

    `arms` is that of a comparison's JSON.
    """
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = (say("FLOPs a picture"), say("Seconds of training"), say("Parameters"))
    for axes, name, title in zip(panels, ("flops_per_image", "train_seconds", "parameters_total"), titles, strict=True):
        for number, (arm, found) in enumerate(arms.items()):
            color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
            score, cost = found[metric], found[name]
            is_measured = isinstance(cost, Mapping)
            x, spread = (cost["mean"], cost["std"]) if is_measured else (cost, None)
            each = cost["values"] if is_measured else [cost] * len(score["values"])
            axes.plot(each, score["values"], linestyle="", marker=".", color=color, alpha=0.5, zorder=2)
            axes.errorbar(
                *(x, score["mean"], score["std"], spread), fmt=marker, color=color, capsize=3, label=arm, zorder=3
            )
        axes.set(title=title, xlim=(0, 1.05 * axes.get_xlim()[1]))  # a mark at the edge would be cut
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if metric in SHARES:
            axes.yaxis.set_major_formatter(style.percent_tick)
    panels[0].set_ylabel(metric_name(metric))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


@style.styled()
def accuracy_against_time(panels: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """How to read it: higher is better, further left is faster; bars are a standard deviation over seeds, dots seeds.

    `panels` has a panel for each set, of contenders by name: each as an arm of a comparison's JSON is.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(1.2 + 3.6 * columns, rows * (3.0 + style.LINE * most)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, contenders) in zip(grid, panels.items(), strict=False):
        for number, (name, found) in enumerate(contenders.items()):
            score, seconds = found["test_accuracy"], found["train_seconds"]
            line = {"color": COLORS[number % len(COLORS)], "zorder": 3}
            marker = MARKERS[(number + number // len(COLORS)) % len(MARKERS)]  # with the colour: another one each time
            axes.plot(seconds["values"], score["values"], linestyle="", marker=".", alpha=0.5, **line)
            bars = {"yerr": score["std"], "xerr": seconds["std"], "capsize": 3}
            axes.errorbar(seconds["mean"], score["mean"], fmt=marker, label=name, **bars, **line)
        every = [value for found in contenders.values() for value in found["train_seconds"]["values"]]
        axes.set(title=title, xlabel=say("Seconds of training"), xscale="log")
        axes.set_xlim(min(every) / 2.3, max(every) * 2.3)  # over five times: so wide that there are two ticks
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(every) < 30 * min(every) else (1,)))
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(style.percent_tick)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.6)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes in grid[: len(panels) : columns]:
        axes.set_ylabel(say("test accuracy"))
    return figure


@style.styled()
def routers_over_time(arms: Mapping[str, Health]) -> Figure:
    """How to read it: flutter should die down; loads far from 1 are experts that starve or that everything goes to.

    Flutter is the share of a sample's tokens whose first expert is another one than an epoch before; a load is the
    emptiest and the fullest expert's, over the fair share. Means over seeds. Arms whose runs have no rows are left out.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    flutter, load = figure.subplots(1, 2)
    routed = {arm: runs for arm, runs in arms.items() if any(runs)}
    for number, (arm, runs) in enumerate(routed.items()):
        line = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        _mean_curve(flutter, runs, "flutter", label=arm, **line)
        _mean_curve(load, runs, "max_load", **line)
        _mean_curve(load, runs, "min_load", linestyle="--", **line)
    flutter.set_title(say("Tokens that changed their expert"))
    flutter.yaxis.set_major_formatter(style.percent_tick)
    load.set_title(say("Load of the fullest and (dashed) the emptiest expert"))
    load.axhline(1, color=theme().muted, linewidth=1)
    for axes in (flutter, load):
        axes.set(ylim=(0, None), xlabel=say("epoch"))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    figure.legend(*flutter.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _mean_curve(axes: Axes, runs: Health, name: str, **line: Any) -> None:
    """Of the runs that have the epoch."""
    by_epoch: dict[float, list[float]] = {}
    for run in runs:
        for row in run:
            if name in row:
                by_epoch.setdefault(row["epoch"], []).append(row[name])
    axes.plot([*by_epoch], [fmean(values) for values in by_epoch.values()], **line)
