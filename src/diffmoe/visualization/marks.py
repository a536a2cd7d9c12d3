"""What the figures of experts share: names of blocks, panels, and the experts' colours in legends and on axes.

Blocks and experts are counted from 1 in figures, from 0 in the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from diffmoe.visualization import style
from diffmoe.visualization.colors import expert_color, ink_on
from diffmoe.visualization.language import say


def block_name(place: str, layer: int) -> str:
    """A block as figures call it."""
    if place == "image":
        return say("image block {number}", number=layer + 1)
    if place == "text":
        return say("text block {number}", number=layer + 1)
    return say("fusion block {number}", number=layer + 1)


def panels(titles: list[str], width: float, height: float, columns: int, below: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels with titles, each of `width` x `height` inches, with `below` inches for a legend.

    At most `columns` stand in a row.
    """
    rows = math.ceil(len(titles) / columns)
    columns = math.ceil(len(titles) / rows)  # rows of about equal length
    figure = Figure(figsize=(max(width * columns, 3.6), height * rows + below), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(len(titles))]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
    return figure, axes


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, from the figure's left and top."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def show_picture(axes: Axes, image: Tensor) -> None:
    """A picture (1 or 3, H, W) uint8, pixel by pixel, with nothing around it."""
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    no_axes(axes)


def label_edges(axes: Sequence[Axes]) -> None:
    """Of panels in rows that share their axes, labels only where there is no panel to the left, or below."""
    columns = axes[0].get_gridspec().ncols  # pyright: ignore[reportOptionalMemberAccess] - they are in a grid
    for number, panel in enumerate(axes):
        if number % columns:
            panel.set_ylabel("")
            panel.tick_params(axis="y", labelleft=False)
        if number + columns < len(axes):
            panel.set_xlabel("")
            panel.tick_params(axis="x", labelbottom=False)


def expert_legend(figure: Figure, num_experts: int, title: str) -> None:
    """Below the figure, which grows where they are many, the experts' numbers beside their colours."""
    columns = min(num_experts, int(figure.get_figwidth() / 0.5))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(num_experts / columns) - 1))
    # Legends are filled column by column; this order makes them read row by row.
    order = [expert for column in range(columns) for expert in range(column, num_experts, columns)]
    handles = [Patch(facecolor=expert_color(expert), label=str(expert + 1)) for expert in order]
    options = {"loc": "outside lower center", "ncols": columns, "title_fontsize": style.SMALL}
    figure.legend(handles=handles, title=title, handlelength=1.1, columnspacing=1.2, **options)


def expert_axis(axis: Axis, positions: Iterable[float]) -> None:
    """The experts' numbers at their positions on an axis, each on its colour."""
    positions = list(positions)
    axis.set_ticks(positions, [str(expert + 1) for expert in range(len(positions))])
    axis.set_tick_params(length=0, pad=5)
    for expert, label in enumerate(axis.get_ticklabels()):
        color = expert_color(expert)
        box = {"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": "none"}
        label.set(color=ink_on(color), bbox=box, fontsize=7)


def no_axes(axes: Axes) -> None:
    """Neither ticks nor grid nor frame."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
