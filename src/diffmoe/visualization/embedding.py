"""The figure of many pictures as points in a plane.

Places are computed in inches, so that names never overlap.
Shapes: N pictures, C classes, P names placed, Q places tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from diffmoe.evaluation.embedding import FEWEST_FOR_TSNE
from diffmoe.visualization import style
from diffmoe.visualization.language import say
from diffmoe.visualization.marks import axes_at
from diffmoe.visualization.style import styled

COLORS = (
    *("#3F90DA", "#FFA90E", "#BD1F01", "#94A4A2", "#832DB6"),
    *("#A96B59", "#E76300", "#B9AC70", "#717581", "#92DADD"),
)
"""Ten that are told apart with every common form of colour blindness (Petroff 2021, arXiv:2107.02270, table 1)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">")
MOST_NAMES = 100
TINY = 6
"""Size of the names of many classes, in points."""
MARGIN = 0.1
"""Around a figure, in inches."""
PLACES = 6000
"""That are tried for a name."""

Points = NDArray[np.float64]


@styled()
def embedding_map(points: Tensor, labels: Tensor, class_names: Sequence[str]) -> Figure:
    """How to read it: what the model finds alike is close; a class that it tells apart is a cluster of its own.

    Each class has its name at its median. Of more than 100 classes the most frequent are named.

    Args:
        points: (N, 2), as `project` returns them; where far clusters lie to each other means little.
        labels: (N,) int64.
        class_names: C of them.
    """
    if not 0 < len(points) == len(labels):
        raise ValueError(f"there are {len(labels)} labels for {len(points)} points")
    if int(labels.max()) >= len(class_names):
        raise ValueError(f"there are {len(class_names)} class names for label {int(labels.max())}")
    classes = [number for number in range(len(class_names)) if (labels == number).any()]
    is_crowded = len(classes) > 20
    side = 8.4 if is_crowded else 6.2
    figure = Figure(figsize=(side + 2 * MARGIN, side + style.LINE + 3 * MARGIN))
    axes = axes_at(figure, MARGIN, MARGIN, side, side)
    places = _in_square(points.double().numpy(), side)
    axes.set(xlim=(0, side), ylim=(0, side), xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=style.GRID)
    axes.grid(visible=False)
    for number in classes:
        _scatter(axes, places[(labels == number).numpy()], number, size=9 if is_crowded else 24)
    named = labels.bincount().argsort(descending=True, stable=True)[: min(len(classes), MOST_NAMES)].sort().values
    medians = np.stack([np.median(places[(labels == number).numpy()], axis=0) for number in named.tolist()])
    names = style.labels(class_names, max_width=14 if is_crowded else 24)
    font_size = TINY if is_crowded else style.SMALL
    _write_names(axes, medians, [names[number] for number in named.tolist()], named.tolist(), side, font_size)
    method = say("PCA, then t-SNE") if len(points) >= FEWEST_FOR_TSNE else say("PCA")
    note = say("{count} pictures; {method}; the axes have no unit", count=len(points), method=method)
    width, height = figure.get_size_inches()
    figure.text(MARGIN / width, MARGIN / height, note, fontsize=style.SMALL, color=style.MUTED)
    return figure


def class_style(number: int) -> tuple[str, str]:
    """Colour and marker of class `number`: both differ among the first ten, the pair among the first hundred."""
    return COLORS[number % 10], MARKERS[(number + number // 10) % 10]


def _in_square(points: Points, side: float) -> Points:
    """The points in a square of `side` inches, both axes to the same scale, with some room around."""
    low, high = points.min(0), points.max(0)
    span = max(float((high - low).max()), 1e-12)
    return (points - (low + high) / 2) / span * 0.94 * side + side / 2


def _scatter(axes: Axes, places: Points, number: int, size: float) -> None:
    color, marker = class_style(number)
    x, y, name = places[:, 0], places[:, 1], f"class {number}"
    axes.scatter(x, y, size, color, marker=marker, alpha=0.75, linewidths=0.3, edgecolors="white", gid=name)


def _write_names(
    axes: Axes, medians: Points, names: Sequence[str], numbers: Sequence[int], side: float, font_size: float
) -> None:
    sizes = np.array([(style.inches(name, font_size) + 0.09, 1.4 * font_size / 72 + 0.04) for name in names])
    box = {"boxstyle": "square,pad=0.2", "linewidth": 0.7, "facecolor": (1, 1, 1, 0.85)}
    for name, number, median, center in zip(names, numbers, medians, _places(medians, sizes, side), strict=True):
        (x, y), (median_x, median_y) = center, median
        if math.dist(center, median) > style.LINE:
            line = {"color": style.INK, "linewidth": 0.6, "marker": "o", "markersize": 2.5, "markevery": [0]}
            axes.plot([median_x, x], [median_y, y], zorder=3, **line)
        edge = {"edgecolor": class_style(number)[0]}
        axes.text(x, y, name, ha="center", va="center", fontsize=font_size, bbox=box | edge, zorder=4)


def _places(wanted_P2: Points, sizes_P2: Points, side: float) -> Points:
    """Centres for boxes of these sizes, each as near to the wanted one as it can be with no overlap; (P, 2).

    A box goes where no earlier one is: at its own centre, or on a spiral around it, within the square of `side`.
    """
    turns = np.arange(PLACES)
    # Golden angles go all around at every distance; the disc holds the square from any of its corners.
    radius, angle = 1.5 * side * turns / PLACES, turns * np.pi * (3 - np.sqrt(5))
    spiral_Q2 = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    centers: list[Points] = []
    for place, (wanted, size) in enumerate(zip(wanted_P2, sizes_P2, strict=True)):
        tried_Q2 = np.clip(wanted + spiral_Q2, size / 2, side - size / 2)
        others = np.array(centers).reshape(-1, 1, 2)
        needed = (sizes_P2[:place, None] + size) / 2
        is_free = (np.abs(tried_Q2 - others) >= needed).any(-1).all(0)
        if not is_free.any():
            raise ValueError(f"there is no room for {len(wanted_P2)} names")
        centers.append(tried_Q2[is_free.argmax()])
    return np.array(centers)
