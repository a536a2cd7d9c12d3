"""Figures of pictures and texts: a sheet of captions, what a text finds, what a picture finds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffmoe.visualization import style
from diffmoe.visualization.style import styled

CELL = 1.75
"""Width of a picture in inches."""
LINE = style.SMALL * 1.25 / 72
"""Height of a line of small text in inches."""


@styled()
def caption_sheet(images: Tensor, captions: Sequence[str], references: Sequence[str] | None = None) -> Figure:
    """How to read it: under each picture is what the model wrote, and in grey what a person wrote.

    `images` (N, 1 or 3, H, W) uint8, `captions` and `references` N texts.
    """
    if len(images) != len(captions) or len(images) == 0:
        raise ValueError(f"{len(images)} pictures and {len(captions)} captions")
    letters = int(CELL / (style.SMALL * style.GLYPH_WIDTH / 72))
    written = [textwrap.wrap(style.drawable(text), letters) or ["(nothing)"] for text in captions]
    human = [
        textwrap.wrap(style.drawable(text.replace(" .", ".")), letters) for text in references or [""] * len(captions)
    ]
    columns = min(6, len(images))
    rows = math.ceil(len(images) / columns)
    lines = max(len(a) + len(b) for a, b in zip(written, human, strict=True))
    height = CELL + LINE * (lines + 1.2) + 0.1
    figure = Figure(figsize=(columns * (CELL + 0.15) + 0.1, rows * height))
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left, top = 0.1 + column * (CELL + 0.15), row * height + 0.05
        axes = _place(figure, left, top, CELL, CELL)
        _show(axes, image)
        below = top + CELL + LINE * 0.4
        for line, (text, color) in enumerate(
            [(text, style.INK) for text in written[number]] + [(text, style.MUTED) for text in human[number]]
        ):
            _write(figure, left, below + line * LINE, text, color)
    return figure


@styled()
def retrieval_grid(query: str, images: Tensor, scores: Tensor, right: Tensor | None = None) -> Figure:
    """How to read it: the pictures that are nearest to the text, the best first, with their cosine similarity.

    `images` (N, 1 or 3, H, W) uint8, `scores` (N,); `right` (N,) bool marks the pictures that the text is of.
    """
    columns = min(6, len(images))
    rows = math.ceil(len(images) / columns)
    width = columns * (CELL + 0.15) + 0.1
    title = textwrap.wrap(f"“{style.drawable(query)}”", int(width / (style.FONT_SIZE * style.GLYPH_WIDTH / 72)))
    head = len(title) * LINE * 1.3 + 0.15
    figure = Figure(figsize=(width, head + rows * (CELL + 0.3)))
    for line, text in enumerate(title):
        _write(figure, 0.1, 0.08 + line * LINE * 1.3, text, style.INK, style.FONT_SIZE)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left, top = 0.1 + column * (CELL + 0.15), head + row * (CELL + 0.3)
        axes = _place(figure, left, top, CELL, CELL)
        _show(axes, image)
        is_right = right is not None and bool(right[number])
        color = style.RIGHT_COLOR if is_right else style.MUTED
        if is_right:
            axes.spines[:].set(visible=True, color=color, linewidth=2)
        _write(figure, left, top + CELL + 0.06, f"{style.RIGHT + ' ' if is_right else ''}{scores[number]:.2f}", color)
    return figure


@styled()
def ranked_texts(image: Tensor, texts: Sequence[str], scores: Tensor, percent: bool = False) -> Figure:
    """How to read it: the texts that are nearest to the picture, the best first; a longer bar is a better match.

    `image` (1 or 3, H, W) uint8, `scores` (N,) cosine similarities, or with `percent` probabilities.
    """
    height = max(CELL + 0.2, 0.36 * len(texts) + 0.25)
    shown = [textwrap.shorten(style.drawable(text), 90, placeholder="…") for text in texts]
    longest = max(style.inches(text, style.SMALL) for text in shown)
    figure = Figure(figsize=(CELL + 1.2 + max(2.0, longest), height))
    _show(_place(figure, 0.1, 0.1, CELL, CELL), image)
    axes = _place(figure, CELL + 0.9, 0.1, max(2.0, longest), height - 0.25)
    places = [-number for number in range(len(texts))]
    axes.barh(places, scores.clamp(min=0).numpy(), height=0.3, color=style.BLUE, align="edge")
    for place, text, score in zip(places, shown, scores.tolist(), strict=True):
        axes.text(0, place - 0.08, text, va="top", ha="left", fontsize=style.SMALL)
        value = f"{score:.1%}" if percent else f"{score:.2f}"
        axes.annotate(value, (0, place + 0.15), (-5, 0), textcoords="offset points", va="center", ha="right")
    axes.set(xlim=(0, 1 if percent else max(float(scores.max()), 1e-6)), ylim=(places[-1] - 0.6, 0.5))
    axes.axis("off")
    return figure


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the figure's top left corner."""
    full_width, full_height = figure.get_size_inches()
    bottom = full_height - top - height
    return figure.add_axes((left / full_width, bottom / full_height, width / full_width, height / full_height))


def _write(figure: Figure, left: float, top: float, text: str, color: str, size: float = style.SMALL) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, color=color, fontsize=size, va="top")


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
