"""Figures of pictures with texts: captions, what a query finds, texts ranked for a picture.

Places are computed in inches, so that a text of any length gets the room it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Transform
from torch import Tensor

from diffmoe.evaluation.retrieval import RECALL_AT
from diffmoe.visualization import style
from diffmoe.visualization.colors import BLUE, theme
from diffmoe.visualization.language import say
from diffmoe.visualization.marks import axes_at, show_picture
from diffmoe.visualization.style import styled

MARGIN = 0.1
"""Around a figure, in inches."""
GAP = 0.18
"""Between pictures, in inches."""
PAD = 4 / 72
"""Between a picture and its text, and between two texts of it, in inches."""


@styled()
def caption_sheet(
    images: Tensor,
    captions: Sequence[str],
    references: Sequence[str] | None = None,
    new: Sequence[bool] | None = None,
) -> Figure:
    """How to read it: under each picture is what the model wrote and, in grey, a reference.

    `images` (N, 1 or 3, H, W) uint8; `captions` and `references`: one text a picture; `new`: whether its pair of
    properties, such as colour and kind, is in no training picture, which is then said below them.
    """
    written = [captions] if references is None else [captions, references]
    for texts in written:
        _check_count("captions", len(texts), images)
    new = [False] * len(images) if new is None else new
    _check_count("marks", len(new), images)
    side, colors = 2.1, (theme().ink, theme().muted)
    wrapped = [
        [
            (style.wrap(text if text.strip() else say("(nothing)"), side, style.SMALL), color)
            for text, color in zip(texts, colors, strict=False)
        ]
        for texts in zip(*written, strict=True)
    ]
    for texts, is_new in zip(wrapped, new, strict=True):
        if is_new:
            texts.append((say("new pair"), theme().wrong))
    below = [sum(PAD + _height(text) for text, _ in texts) for texts in wrapped]
    figure, panels = _grid(images, side, below, most_columns=4)
    for axes, texts in zip(panels, wrapped, strict=True):
        above: Transform | Text = axes.transAxes
        for text, color in texts:
            above = _write_below(axes, above, text, color)
    return figure


def caption_scores(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Of what testing a captioner measures, by key: its name in the current language, and its value as it is written.

    What else is in `metrics` is left out.
    """
    names = {
        "test_loss": say("next-token loss, nats"),
        "test_accuracy": say("next-token accuracy"),
        **{f"bleu{n}": f"BLEU-{n}" for n in range(1, 5)},
        **{"rouge_l": "ROUGE-L", "meteor": "METEOR", "cider": "CIDEr-D"},
        **{f"i2t_r{k}": say("picture -> text R@{k}", k=k) for k in RECALL_AT},
        "i2t_median_rank": say("picture -> text median rank"),
        **{f"t2i_r{k}": say("text -> picture R@{k}", k=k) for k in RECALL_AT},
        "t2i_median_rank": say("text -> picture median rank"),
        "captions_right": say("captions right, known pairs"),
        "captions_right_held_out": say("captions right, new pairs"),
        "t2i_r1_seen": say("text -> picture R@1, known pairs"),
        "t2i_r1_achievable": say("the same at best, known pairs"),
        "t2i_r1_held_out": say("text -> picture R@1, new pairs"),
        "t2i_r1_achievable_held_out": say("the same at best, new pairs"),
    }
    return {key: (name, _written(key, metrics[key])) for key, name in names.items() if key in metrics}


def _written(key: str, value: float) -> str:
    if key.startswith(("i2t_r", "t2i_r", "captions_right")) or key.endswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:g}" if key.endswith("rank") else f"{value:.3f}"


@styled()
def retrieval_grid(query: str, images: Tensor, scores: Tensor, right: Tensor | None = None) -> Figure:
    """How to read it: on top the text that was looked for, then what was found, best first; ✓ is the text's own.

    `images` (N, 1 or 3, H, W) uint8; `scores` (N,) similarities, written under the pictures; `right` (N,) bool.
    """
    _check_count("scores", len(scores), images)
    side, columns = 1.6, min(5, len(images))
    asked = style.wrap(query, columns * (side + GAP) - GAP, style.FONT_SIZE)
    above = _height(asked, style.FONT_SIZE) + 2 * PAD
    below = PAD + _height("score")
    order = scores.argsort(descending=True, stable=True)
    figure, panels = _grid(images[order], side, [below] * len(images), columns, above)
    width, height = figure.get_size_inches()
    figure.text(MARGIN / width, 1 - MARGIN / height, asked, va="top", fontsize=style.FONT_SIZE)
    for axes, row in zip(panels, order.tolist(), strict=True):
        is_right = right is not None and bool(right[row])
        color = theme().right if is_right else theme().ink
        mark = f"{style.RIGHT} " if is_right else ""
        _write_below(axes, axes.transAxes, f"{mark}{scores[row]:.3f}", color)
        if is_right:
            axes.spines[:].set(visible=True, color=color, linewidth=2)
    return figure


@styled()
def ranked_texts(image: Tensor, texts: Sequence[str], scores: Tensor, probabilities: bool = False) -> Figure:
    """How to read it: beside the picture the texts, the one that fits it best on top; a longer bar fits better.

    `image` (1 or 3, H, W) uint8; `scores` (len(texts),): similarities, or from 0 to 1 where they are `probabilities`.
    """
    if not 0 < len(texts) == len(scores):
        raise ValueError(f"there are {len(scores)} scores for {len(texts)} texts")
    order = scores.argsort(descending=True, stable=True).tolist()
    values = [float(scores[row]) for row in order]
    wrapped = [style.wrap(str(texts[row]), 3.2, style.SMALL) for row in order]
    side, title, bars, numbers = 2.4, 0.3, 1.6, 0.6
    labels = max(style.inches(line, style.SMALL) for text in wrapped for line in text.split("\n"))
    tall = side * image.shape[1] / image.shape[2]
    heights = [_height(text) + 2 * PAD for text in wrapped]
    left = MARGIN + side + GAP + labels + 2 * PAD
    width, height = left + bars + numbers + MARGIN, max(tall, title + sum(heights)) + 2 * MARGIN
    figure = Figure(figsize=(width, height))
    show_picture(axes_at(figure, MARGIN, MARGIN, side, tall), image)
    axes = axes_at(figure, left, MARGIN + title, bars, sum(heights))
    centers = np.cumsum(heights) - np.array(heights) / 2
    axes.barh(centers, values, height=0.13, color=BLUE)
    axes.axvline(0, color=theme().muted, linewidth=0.8)
    limits = (0, 1) if probabilities else (min(0, *values), max(1e-6, *values))
    axes.set(xlim=limits, ylim=(sum(heights), 0), xticks=[])
    axes.set_yticks(centers, wrapped, linespacing=1.2)
    axes.tick_params(length=0, pad=2 * PAD * 72)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(
        say("probability") if probabilities else say("similarity"), fontsize=style.SMALL, color=theme().muted
    )
    for center, value in zip(centers, values, strict=True):
        number = f"{value:.1%}" if probabilities else f"{value:.3f}"
        axes.text(1.04, center, number, transform=axes.get_yaxis_transform(), va="center", fontsize=style.SMALL)
    return figure


def _check_count(what: str, count: int, images: Tensor) -> None:
    if len(images) == 0:
        raise ValueError("there are no pictures to draw")
    if count != len(images):
        raise ValueError(f"there are {count} {what} for {len(images)} pictures")


def _height(text: str, font_size: float = style.SMALL) -> float:
    """Inches that the lines of `text` take."""
    return (text.count("\n") + 1) * style.LINE_HEIGHT * font_size / 72


def _grid(
    images: Tensor, side: float, below: Sequence[float], most_columns: int, above: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Pictures `side` inches wide, in rows; `below`: inches that each needs under it; `above`: on top of all."""
    columns = min(most_columns, len(images))
    tall = side * images.shape[2] / images.shape[3]
    rows = [tall + max(below[start : start + columns]) for start in range(0, len(images), columns)]
    width = columns * (side + GAP) - GAP + 2 * MARGIN
    figure = Figure(figsize=(width, above + sum(rows) + (len(rows) - 1) * GAP + 2 * MARGIN))
    panels = []
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top = MARGIN + above + sum(rows[:row]) + row * GAP
        panels.append(axes_at(figure, MARGIN + column * (side + GAP), top, side, tall))
        show_picture(panels[-1], image)
    return figure, panels


def _write_below(axes: Axes, above: Transform | Text, text: str, color: str) -> Text:
    """Write from the lower left corner of `above` down."""
    return axes.annotate(
        text,
        (0, 0),
        xycoords=above,
        xytext=(0, -PAD * 72),
        textcoords="offset points",
        va="top",
        color=color,
        fontsize=style.SMALL,
    )
