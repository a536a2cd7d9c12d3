"""Figures of what the experts do: who takes which patch, how much, of which class, and what is lost without them.

The same expert has the same colour in all of them. Figures count blocks and experts from 1, the code from 0.
Shapes: N pictures, T tokens, K chosen experts, E experts, C classes, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from diffmoe.evaluation.ablation import Ablation
from diffmoe.evaluation.experts import (
    BlockRouting,
    coactivation,
    imbalance,
    mutual_information,
    tokens_per_expert,
)
from diffmoe.evaluation.history import load_history
from diffmoe.visualization import style
from diffmoe.visualization.language import say
from diffmoe.visualization.marks import (
    block_name,
    expert_axis,
    expert_legend,
    ink_on,
    label_edges,
    no_axes,
    panels,
    show_picture,
)
from diffmoe.visualization.patches import favourite_sheet, on_grid, patch_size, routing_picture, tile_step
from diffmoe.visualization.style import expert_color, styled

BINS = 40
MOST_ROWS = 30
"""Of a heat map whose cells are written in."""
PLACE_COLORS = {"image": style.BLUE, "text": style.GREEN, "fusion": style.ORANGE}


@styled()
def routing_map(image: Tensor, blocks: Sequence[BlockRouting], layer: int | None = None) -> Figure:
    """How to read it: a patch has the colour of its first expert, its corner that of the second, as large as its gate.

    `image` (1 or 3, H, W) uint8; `blocks`: the routing of this one picture (N = 1), of which those of the image tower
    are drawn: all, or the one with number `layer` (from 0), larger and with its first experts' numbers. Of more than
    two experts the first two are drawn.
    Raises `ValueError` where there is no such block, or its tokens are not the picture's patches.
    """
    shown = [block for block in blocks if block.place == "image" and layer in (None, block.layer)]
    if not shown:
        which = "" if layer is None else f" in block {layer}"
        raise ValueError(f"there is no routing of the image tower{which}: there is nothing to draw")
    side = 2.1 if layer is None else 3.4
    names = [say("picture"), *(block_name(block.place, block.layer) for block in shown)]
    figure, (picture, *maps) = panels(names, side, side + 0.3, columns=4, below=0.55)
    show_picture(picture, image)
    for axes, block in zip(maps, shown, strict=True):
        _show_routing(axes, image, block, numbered=layer is not None)
    is_top_1 = shown[0].top_k == 1
    expert_legend(figure, shown[0].num_experts, say("expert") if is_top_1 else say("expert (corner: second choice)"))
    return figure


def _show_routing(axes: Axes, image: Tensor, block: BlockRouting, numbered: bool) -> None:
    height, width = image.shape[1:]
    patch = patch_size(image, block)
    axes.imshow(routing_picture(image, block), extent=(0, width, height, 0), interpolation="nearest")
    axes.vlines(np.arange(patch, width, patch), 0, height, color="white", linewidth=0.8)
    axes.hlines(np.arange(patch, height, patch), 0, width, color="white", linewidth=0.8)
    if numbered:
        ids_RQK, _ = on_grid(image, block)
        for (row, column), expert in np.ndenumerate(ids_RQK[..., 0]):
            color = expert_color(expert)
            box = {"boxstyle": "square,pad=0.1", "facecolor": color, "edgecolor": "none"}
            place = ((column + 0.09) * patch, (row + 0.12) * patch)
            text = axes.text(*place, str(expert + 1), fontsize=6, va="top", color=ink_on(color), bbox=box)
            text.set_in_layout(False)
    no_axes(axes)


@styled()
def utilization(blocks: Sequence[BlockRouting]) -> Figure:
    """How to read it: a bar is a block's load, expert by expert; the more it looks like the top bar, the more even.

    Beside it: CV (standard deviation over mean), 0 when even; the fullest expert's load over the mean; experts without
    a token; the entropy of the load over its maximum, 1 when even. Raises `ValueError` where there are no blocks.
    """
    _check(blocks)
    num_experts = blocks[0].num_experts
    figure = Figure(figsize=(8, 0.36 * len(blocks) + 1.0), layout="constrained")
    axes, table = figure.subplots(1, 2, width_ratios=[1.7, 1], sharey=True)
    numbers = [str(expert + 1) for expert in range(num_experts)]
    _stack(axes, -1, np.full(num_experts, 1 / num_experts), numbers)
    _write_row(table, -1, (say("CV"), say("max/mean"), say("dead"), say("entropy")), style.MUTED)
    for row, block in enumerate(blocks):
        counts = tokens_per_expert(block)
        share = (counts / counts.sum()).numpy()
        _stack(axes, row, share, [f"{part:.0%}" for part in share])
        found = imbalance(counts)
        cells = (f"{found['cv']:.2f}", f"{found['max_over_mean']:.2f}", f"{found['dead']:.0f}")
        _write_row(table, row, (*cells, f"{found['normalized_entropy']:.3f}"), style.INK)
    names = [block_name(block.place, block.layer) for block in blocks]
    axes.set_yticks(range(-1, len(blocks)), [say("expert, at even load"), *names])
    axes.set(xlim=(0, 1), ylim=(len(blocks) - 0.5, -1.5), xlabel=say("share of the block's routed tokens"))
    axes.xaxis.set_major_formatter(style.percent_tick)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    table.set_axis_off()
    return figure


def _check(blocks: Sequence[BlockRouting]) -> None:
    if not blocks:
        raise ValueError("there are no routed blocks: the model is dense")


def _stack(axes: Axes, row: int, shares: NDArray[Any], texts: Sequence[str]) -> None:
    """One bar in the experts' colours; a text stands in a part that is wide enough."""
    left = 0.0
    for expert, (share, text) in enumerate(zip(shares.tolist(), texts, strict=True)):
        color = expert_color(expert)
        axes.barh(row, share, 0.64, left, color=color, edgecolor="white", linewidth=0.8)
        if share > 0.012 * len(text) + 0.01:
            written = axes.text(left + share / 2, row, text, ha="center", va="center", fontsize=7, color=ink_on(color))
            written.set_in_layout(False)
        left += share


def _write_row(table: Axes, row: int, texts: Sequence[str], color: str) -> None:
    for column, text in enumerate(texts, 1):
        table.text(column, row, text, ha="center", va="center", fontsize=style.SMALL, color=color)
    table.set_xlim(0.5, len(texts) + 0.5)


@styled()
def load_over_time(history: Sequence[Mapping[str, float]]) -> Figure:
    """How to read it: a band is an expert's share of the load; bands of equal height are balance, one alone collapse.

    `history`: rows with `epoch` and the keys of `evaluation.history.routing_metrics`; a row without them is left out.
    Raises `ValueError` where no row has them.
    """
    loads = load_history(history)
    if not loads:
        raise ValueError("the history has no expert load")
    figure, axes = panels([block_name(*block) for block in loads], 2.5, 2.1, columns=4, below=0.6)
    for panel, (epochs, load_SE) in zip(axes, loads.values(), strict=True):
        edges = np.array([epochs[0] - 0.5, *(epoch + 0.5 for epoch in epochs)])
        tops = load_SE.double().cumsum(1).numpy().T
        bottoms = np.vstack([np.zeros(len(epochs)), tops[:-1]])
        for expert, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):
            panel.stairs(top, edges, baseline=bottom, fill=True, color=expert_color(expert))
        panel.set(xlim=(edges[0], edges[-1]), ylim=(0, 1), xlabel=say("epoch"))
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        panel.yaxis.set_major_formatter(style.percent_tick)
        panel.grid(visible=False)
    label_edges(axes)
    expert_legend(figure, max(load_SE.shape[1] for _, load_SE in loads.values()), say("expert"))
    return figure


@styled()
def favourite_patches(images: Any, block: BlockRouting, patch_size: int, count: int = 12) -> Figure:
    """How to read it: a row has the patches that an expert has the highest gates for, best first, framed in its colour.

    `images` uint8 (N, 1 or 3, H, W), or what gives such a picture for its row; `block`: their routing in the image
    tower. A patch stands amid its neighbours; of one picture there is at most one.
    """
    span, step, inches = 3 * patch_size, tile_step(patch_size), 0.58
    sheet, places = favourite_sheet(images, block, patch_size, count)
    figure = Figure(figsize=(count * inches + 0.7, block.num_experts * inches + 0.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(sheet, interpolation="nearest")
    frames = [
        Rectangle(
            (column * step + patch_size - 0.5, expert * step + patch_size - 0.5),
            *(patch_size, patch_size),
            edgecolor=expert_color(expert),
        )
        for expert, column, _, _ in places.tolist()
    ]
    axes.add_collection(PatchCollection(frames, match_original=True, facecolor="none", linewidth=1.8))
    no_axes(axes)
    expert_axis(axes.yaxis, [expert * step + span / 2 - 0.5 for expert in range(block.num_experts)])
    axes.set(ylabel=say("expert"), title=block_name(block.place, block.layer))
    return figure


@styled()
def specialization(counts: Tensor, class_names: Sequence[str]) -> Figure:
    """How to read it: a row shows where a class's patches go; rows that differ are specialisation, equal rows are none.
    Above: I, how many bits the expert of a patch tells of its class, none where it is 0, and the part of the most.

    I is their mutual information, the most the smaller of their entropies. `counts` (C, E) of one block of the image
    tower, or (L, C, E) of blocks 0 to L - 1, as `class_expert_counts` gives them. Raises `ValueError` where there are
    not C names.
    """
    counts = counts[None] if counts.dim() == 2 else counts
    if len(class_names) != counts.shape[1]:
        raise ValueError(f"there are {len(class_names)} class names for {counts.shape[1]} classes")
    titles: list[str] = []
    for layer, counts_CE in enumerate(counts):
        bits, part = mutual_information(counts_CE)
        titles.append(f"{block_name('image', layer)}\n{say('I = {bits:.2f} bits ({part:.0%})', bits=bits, part=part)}")
    shares = (counts / counts.sum(2, keepdim=True).clamp_min(1)).numpy()
    figure, axes = _heat_maps(shares, titles, say("share of the class's routed tokens"))
    for panel in axes:
        _name_classes(panel, class_names)
        panel.set_xlabel(say("expert"))
    label_edges(axes)
    return figure


def _name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    """On the rows; every so many where they are too many."""
    every = -(-len(class_names) // MOST_ROWS)
    axes.set_yticks(range(0, len(class_names), every), style.labels(class_names)[::every])
    axes.tick_params(axis="y", length=0)


@styled()
def coactivation_map(blocks: Sequence[BlockRouting]) -> Figure:
    """How to read it: a cell says how many of the tokens of the row's expert go to the column's expert as well.

    `blocks`: those with one expert a token are left out. Raises `ValueError` where that leaves none.
    """
    _check(blocks)
    shown = [block for block in blocks if block.top_k > 1]
    if not shown:
        raise ValueError("every token is sent to one expert: no two of them work together")
    shares = []
    for block in shown:
        counts = coactivation(block).double()
        share = counts / counts.diagonal().clamp_min(1)[:, None]
        shares.append(share.fill_diagonal_(math.nan).numpy())
    titles = [block_name(block.place, block.layer) for block in shown]
    figure, axes = _heat_maps(np.stack(shares), titles, say("share of the row's tokens"))
    for panel in axes:
        expert_axis(panel.yaxis, range(shown[0].num_experts))
        panel.set(facecolor=style.GRID, xlabel=say("also sent to expert"), ylabel=say("tokens of expert"))
    label_edges(axes)
    return figure


def _heat_maps(values: NDArray[Any], titles: list[str], label: str) -> tuple[Figure, list[Axes]]:
    """Shares (L, rows, E), a panel for each L, the experts below; written in the cells where there is room."""
    num_panels, num_rows, num_experts = values.shape
    is_written = num_panels <= 4 and num_rows <= MOST_ROWS
    cell = 0.36 if is_written else 0.2
    width = max(cell * num_experts, 1.6)
    height = num_rows * min(0.75 * cell if is_written else cell, 7 / num_rows)
    figure, axes = panels(titles, width + 0.3, max(height, 1.6) + 0.5, columns=max(1, int(8 / width)), below=0.4)
    top = float(np.nanmax(values)) or 1
    for panel, value in zip(axes, values, strict=True):
        panel.imshow(value, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        if is_written:
            _write_cells(panel, value, lambda share: f"{100 * share:.0f}", value > 0.55 * top)
        expert_axis(panel.xaxis, range(num_experts))
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
    bar = figure.colorbar(axes[0].images[0], ax=axes, fraction=0.04, aspect=25, pad=0.02)
    bar.ax.yaxis.set_major_formatter(style.percent_tick)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label(label)
    return figure, axes


def _write_cells(axes: Axes, values: NDArray[Any], write: Callable[[float], str], is_dark: NDArray[np.bool_]) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if is_dark[row, column] else style.INK
            text = axes.text(column, row, write(value), ha="center", va="center", fontsize=7, color=ink)
            text.set_in_layout(False)  # it is inside: the layout need not measure it, which takes long


@styled()
def router_confidence(blocks: Sequence[BlockRouting]) -> Figure:
    """How to read it: a router that is sure has its hills far right in the left panel and far left in the right one.
    The line in a hill is its median; at the dotted line all experts would be equally likely.

    Of each block the distribution over its tokens of the largest router probability, from 1/E (dotted) to 1, and of
    the entropy of the probabilities, from 0 to ln E nats (dotted), where all experts are equally likely; a tick marks
    the median. Each hill is drawn as high as the others. Raises `ValueError` where there are no blocks.
    """
    _check(blocks)
    undecided = math.log(blocks[0].num_experts)
    figure = Figure(figsize=(8, 0.5 * len(blocks) + 1.1), layout="constrained")
    confidence, entropy = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
    for row, block in enumerate(blocks):
        color = PLACE_COLORS[block.place]
        _hill(confidence, row, block.confidence[block.real], 1.0, color)
        _hill(entropy, row, block.entropy[block.real], undecided, color)
    confidence.axvline(1 / blocks[0].num_experts, color=style.MUTED, linestyle=":", linewidth=1)
    entropy.axvline(undecided, color=style.MUTED, linestyle=":", linewidth=1)
    confidence.set(xlim=(0, 1), xlabel=say("largest probability"), title=say("Router confidence"))
    entropy.set(xlim=(0, 1.04 * undecided), xlabel=say("entropy, nats"), title=say("Router entropy"))
    confidence.set_yticks(range(len(blocks)), [block_name(block.place, block.layer) for block in blocks])
    confidence.set_ylim(len(blocks) - 0.7, -1)
    for axes in (confidence, entropy):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def _hill(axes: Axes, row: int, values: Tensor, top: float, color: str) -> None:
    """A histogram that stands on the line `row`, 0.8 high, with its median."""
    counts, edges = np.histogram(values.numpy(), bins=BINS, range=(0, top))
    heights = 0.8 * counts / max(counts.max(), 1)
    axes.stairs(row - heights, edges, baseline=row, fill=True, color=color, alpha=0.75)
    axes.plot([float(values.median())] * 2, [row, row - 0.8], color=style.INK, linewidth=1.2)


@styled()
def ablation_map(ablation: Ablation) -> Figure:
    """How to read it: a cell is the change of accuracy without the expert: the redder, the more it is needed.

    Its tokens go where the router sends them among the rest. Near 0 the sign is chance.
    """
    change = 100 * (ablation.accuracy.numpy() - ablation.whole)
    num_blocks, num_experts = change.shape
    figure = Figure(figsize=(max(0.56 * num_experts + 1.8, 5), 0.42 * num_blocks + 1.1), layout="constrained")
    axes = figure.add_subplot()
    most = max(float(np.abs(change).max()), 0.1)
    axes.imshow(change, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    _write_cells(axes, change, _points, np.abs(change) > 0.6 * most)
    expert_axis(axes.xaxis, range(num_experts))
    axes.set_xlabel(say("expert switched off"))
    axes.set_yticks(range(num_blocks), [block_name(*place) for place in ablation.places])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    whole, count = ablation.whole, ablation.num_pictures
    axes.set_title(say("Points of accuracy, from {whole:.1%} on {count:,} pictures", whole=whole, count=count))
    return figure


def _points(change: float) -> str:
    return "0" if abs(change) < 0.05 else f"{change:+.1f}".replace("-", "−")
