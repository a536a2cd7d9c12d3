"""Figures of where a model looked: heat maps over a picture.

Places are computed in inches, so that titles of any length get the room they need.
Shapes: N patches, W words, C classes, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.evaluation.attention import image_maps
from diffmoe.model.encoders import AttentionMap
from diffmoe.visualization import style
from diffmoe.visualization.language import say
from diffmoe.visualization.marks import axes_at, block_name, no_axes
from diffmoe.visualization.style import styled

MOST = 24
"""Words or classes in one figure, at most."""
COLUMNS = 6
MARGIN, GAP = 0.1, 0.12
"""Around a figure and between its pictures, in inches."""
SIDE, WIDTH = 1.25, 8.5
"""A picture's width, in inches, and about the most that all of a row may take."""
BAR, BAR_HEIGHT, NUMBERS = 0.13, 2.7, 0.55
"""The colour bar's width, its greatest height and the room for its numbers, in inches."""

COLORS = matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))
COLORS[:, 3] = np.linspace(0.35, 0.85, 256)
"""Of a heat map, from low to high: the lower, the more of the picture is seen through it."""
DARK, LIGHT = 0.2, 0.85
"""What black and white of the picture become under it."""


class _Panel(NamedTuple):
    """One picture of a figure, with a heat map over it or without."""

    row: int
    column: int
    title: str
    heat: NDArray[np.float32] | None
    """(N,)."""
    side_title: str = ""


@styled()
def attention_maps(image: Tensor, maps: Sequence[AttentionMap], patch: int | None = None) -> Figure:
    """How to read it: a bright patch is looked at much: by the framed patch, or by all of them where none is framed.

    A row is a block of the image tower; first the mean of its heads, then each head.

    Args:
        image: (1 or 3, height, width) uint8.
        maps: of this one picture; only those of the image tower are drawn.
        patch: whose attention to draw, numbered row by row; None is the mean over all.
    """
    blocks = image_maps(maps)
    num_patches = blocks[0].weights.shape[-1]
    if patch is not None and not 0 <= patch < num_patches:
        raise UserError(f"patch is {patch}: it must be 0 to {num_patches - 1}")
    panels = [_Panel(0, 0, say("picture"), None)]
    for row, block in enumerate(blocks):
        heads_HNN = _of_one_picture(block)
        heat_HN = heads_HNN.mean(1) if patch is None else heads_HNN[:, patch]
        names = [say("mean of heads"), *(say("head {number}", number=head + 1) for head in range(len(heat_HN)))]
        heats = [heat_HN.mean(0), *heat_HN]
        for column, (name, heat) in enumerate(zip(names, heats, strict=True)):
            panels.append(
                _Panel(row, 1 + column, "" if row else name, heat, "" if column else block_name("image", block.layer))
            )
    return _sheet(image, panels, _share_of_attention(num_patches), patch)


@styled()
def attention_rollout(image: Tensor, weights: Tensor) -> Figure:
    """How to read it: the brighter a patch, the more of it is in what the image tower says of the picture.

    `image` (1 or 3, height, width) uint8; `weights` (N,), as of `rollout(maps)[b].mean(0)`.
    """
    heat = weights.detach().float().cpu().numpy()
    panels = [_Panel(0, 0, say("picture"), None), _Panel(0, 1, say("attention rollout"), heat)]
    label = say("share of the picture's embedding\n(even: {share:.1%})", share=1 / len(heat))
    return _sheet(image, panels, label, side=2 * SIDE)


@styled()
def word_maps(image: Tensor, words: Sequence[str], weights: Tensor) -> Figure:
    """How to read it: a bright patch is one that the model looked at much as it wrote the word above.

    At most `MOST` words are drawn, the first ones.

    Args:
        image: (1 or 3, height, width) uint8.
        words: W of them.
        weights: (W, N), rows sum to 1: those of `word_attention`.
    """
    _check_count("words", len(words), weights)
    return _named_maps(image, words[:MOST], weights[:MOST], _share_of_attention(weights.shape[1]))


@styled()
def class_maps(
    image: Tensor,
    class_names: Sequence[str],
    values: Tensor,
    kind: Literal["similarity", "attention"] = "similarity",
) -> Figure:
    """How to read it: a bright patch goes well with the description of the class above; the bar has the measure.

    Of more than `MOST` classes those with the largest mean are drawn.

    Args:
        image: (1 or 3, height, width) uint8.
        class_names: C of them.
        values: (C, N).
        kind: what they are: "similarity" is the cosine of a patch and a description, of `patch_similarity`;
            "attention" the share of a patch's attention that a description gets, of `description_attention`.
    """
    _check_count("class names", len(class_names), values)
    chosen = values.mean(1).argsort(descending=True, stable=True)[:MOST].sort().values.tolist()
    names = style.labels(class_names, max_width=40)
    label = say("cosine of patch and class description")
    if kind == "attention":
        label = say("share of the patch's attention\n(even: {share:.1%})", share=1 / len(values))
    return _named_maps(image, [names[row] for row in chosen], values[chosen], label, percent=kind == "attention")


def _share_of_attention(num_patches: int) -> str:
    return say("share of the attention\n(even: {share:.1%})", share=1 / num_patches)


def _named_maps(image: Tensor, names: Sequence[str], heats: Tensor, label: str, percent: bool = True) -> Figure:
    """The picture, then a heat map under each name, in rows."""
    panels = [_Panel(0, 0, say("picture"), None)]
    columns = min(COLUMNS, len(names) + 1)
    for number, (name, heat) in enumerate(zip(names, heats.detach().float().cpu().numpy(), strict=True), start=1):
        panels.append(_Panel(*divmod(number, columns), name, heat))
    return _sheet(image, panels, label, percent=percent)


def _of_one_picture(attention: AttentionMap) -> NDArray[np.float32]:
    """Its weights, (H, N, N)."""
    if len(attention.weights) != 1:
        raise ValueError(f"attention maps of {len(attention.weights)} pictures: they must be of one")
    return attention.weights[0].detach().float().cpu().numpy()


def _check_count(what: str, count: int, values: Tensor) -> None:
    if not 0 < count == len(values):
        raise ValueError(f"there are {len(values)} maps for {count} {what}")


def _sheet(
    image: Tensor,
    panels: Sequence[_Panel],
    label: str,
    patch: int | None = None,
    percent: bool = True,
    side: float = SIDE,
) -> Figure:
    """Draw `panels` on a grid, with one colour bar, which `label` explains, for all of them."""
    columns = 1 + max(panel.column for panel in panels)
    side = min(side, WIDTH / columns)
    tall = side * image.shape[1] / image.shape[2]
    titles = [style.wrap(panel.title, side, style.SMALL, max_lines=2) for panel in panels]
    side_titles = [style.wrap(panel.side_title, tall, style.SMALL, max_lines=2) for panel in panels]
    beside = max(map(_num_lines, side_titles)) * style.LINE
    tops = _tops(panels, titles, tall)
    bottom = tops[-1] + tall
    bar_left, bar_height = MARGIN + columns * (side + GAP) + beside, min(bottom - tops[0], BAR_HEIGHT)
    label = "\n".join(style.wrap(line, bar_height, style.SMALL) for line in label.split("\n"))
    width = bar_left + BAR + NUMBERS + _num_lines(label) * style.LINE + MARGIN
    figure = Figure(figsize=(width, bottom + MARGIN))
    heats = np.stack([panel.heat for panel in panels if panel.heat is not None])
    norm = _norm(heats, percent)
    for panel, title, side_title in zip(panels, titles, side_titles, strict=True):
        left = MARGIN + panel.column * (side + GAP) + (beside if panel.column else 0)
        axes = axes_at(figure, left, tops[panel.row], side, tall)
        _show(axes, image, panel.heat, norm)
        axes.set_title(title, fontsize=style.SMALL, pad=3, linespacing=1.2)
        axes.set_ylabel(side_title, fontsize=style.SMALL, labelpad=3, linespacing=1.2)
        if patch is not None:
            _frame(axes, image, patch, heats.shape[1])
    _color_bar(axes_at(figure, bar_left, tops[0], BAR, bar_height), norm, label, percent)
    return figure


def _tops(panels: Sequence[_Panel], titles: Sequence[str], tall: float) -> list[float]:
    """Of each row of pictures, under the longest of its titles; in inches from the figure's top."""
    tops: list[float] = []
    for row in range(1 + max(panel.row for panel in panels)):
        lines = max(_num_lines(title) for title, panel in zip(titles, panels, strict=True) if panel.row == row)
        tops.append((tops[-1] + tall + GAP if tops else MARGIN) + lines * style.LINE)
    return tops


def _norm(heats: NDArray[np.float32], percent: bool) -> Normalize:
    """From a value to its place on the colour bar, 0 to 1."""
    # At least a little wide: even attention would be noise in the brightest colours.
    low, high = heats.min(), max(heats.max(), heats.min() + 1e-3)
    # Shares are often tiny but for a few: their roots tell the tiny ones apart.
    return PowerNorm(0.5, low, high) if percent else Normalize(low, high)


def _num_lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _show(axes: Axes, image: Tensor, heat: NDArray[np.float32] | None, norm: Normalize) -> None:
    """The picture; with `heat` in grey, the cells of the heat map over it."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    height, width, channels = pixels.shape
    show = partial(axes.imshow, interpolation="nearest", extent=(0, width, height, 0))
    if heat is None:
        show(pixels, cmap="gray", vmin=0, vmax=255)
    else:
        grey = pixels @ np.array(style.LUMA if channels == 3 else (1,)) / 255
        show(DARK + (LIGHT - DARK) * grey, cmap="gray", vmin=0, vmax=1)
        show(heat.reshape(_grid(len(heat), image)), cmap=ListedColormap(COLORS), norm=norm)
    no_axes(axes)


def _grid(num_patches: int, image: Tensor) -> tuple[int, int]:
    """Rows and columns of square patches that fill the picture."""
    height, width = image.shape[1:]
    rows = round(math.sqrt(num_patches * height / width))
    if rows == 0 or num_patches % rows or rows * width != num_patches // rows * height:
        raise ValueError(f"{num_patches} square patches do not fill a picture of {height}x{width}")
    return rows, num_patches // rows


def _frame(axes: Axes, image: Tensor, patch: int, num_patches: int) -> None:
    rows, columns = _grid(num_patches, image)
    row, column = divmod(patch, columns)
    height, width = image.shape[1] / rows, image.shape[2] / columns
    for color, thickness in (("white", 2.4), (style.VERMILLION, 1.2)):
        corner = (column * width, row * height)
        axes.add_patch(Rectangle(corner, width, height, fill=False, color=color, linewidth=thickness, clip_on=False))


def _color_bar(axes: Axes, norm: Normalize, label: str, percent: bool) -> None:
    """What each colour over a middling grey stands for."""
    grey = (DARK + LIGHT) / 2
    opacity = COLORS[:, 3:]
    seen = ListedColormap(opacity * COLORS[:, :3] + (1 - opacity) * grey)
    assert norm.vmin is not None
    assert norm.vmax is not None
    ticks = [tick for tick in MaxNLocator(4).tick_values(norm.vmin, norm.vmax) if norm.vmin <= tick <= norm.vmax]
    bar = axes.figure.colorbar(ScalarMappable(norm, seen), cax=axes, ticks=ticks)
    bar.ax.yaxis.set_major_formatter(style.percent_tick if percent else "{x:g}")
    bar.ax.tick_params(length=2)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=style.SMALL, linespacing=1.2)
