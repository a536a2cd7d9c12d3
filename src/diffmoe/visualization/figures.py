"""Figures of training and of classification: pure functions of evaluation's outputs.

They build `matplotlib.figure.Figure` directly: no pyplot, so no window, no global state, nothing to close.
Shapes: N pictures, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.evaluation.classification import CALIBRATION_BINS, Predictions, calibration_bins, calibration_error
from diffmoe.files import write_atomically
from diffmoe.visualization import style
from diffmoe.visualization.colors import BLUE, ORANGE, SKY, VERMILLION, ink_on, theme
from diffmoe.visualization.language import say
from diffmoe.visualization.style import styled

History = Sequence[Mapping[str, float]]
Panel = Callable[[Axes, History], None]

MAIN_LOSSES = {"train_loss", "task_loss", "val_loss"}
MARKERS_UP_TO = 25
"""A curve of at most so many points shows each of them."""


@styled()
def training_curves(history: History, accuracy: str = "Accuracy") -> Figure:
    """How to read it: loss should fall and accuracy rise; a growing gap between train and validation is overfitting.

    `history` has a row for each epoch: `epoch`, and any of `train_loss`, `task_loss` (its part without the auxiliary
    losses), `val_loss`, `train_accuracy`, `val_accuracy` (0 to 1), `lr` (at its end), `peak_lr`. Every further key that
    ends in `_loss` is an auxiliary loss and gets a small panel with a scale of its own. What is missing or nan is left
    out. `accuracy` is what the accuracy is of.
    """
    keys = {key: None for row in history for key in row if math.isfinite(row[key])}
    parts = [key for key in keys if key.endswith("_loss") and key not in MAIN_LOSSES]
    panels: tuple[tuple[Panel, set[str]], ...] = (
        (_loss_panel, MAIN_LOSSES),
        (partial(_accuracy_panel, title=accuracy), {"train_accuracy", "val_accuracy"}),
        (_learning_rate_panel, {"lr"}),
    )
    main = [panel for panel, needs in panels if needs & keys.keys()]
    auxiliary = [partial(_auxiliary_panel, key=key) for key in parts]
    rows: list[list[Panel]] = [main] if main else []
    rows += [[*auxiliary[start : start + 4]] for start in range(0, len(auxiliary), 4)]
    if not rows:
        raise ValueError("the history has nothing to draw")
    heights = [3.5 if row is main else 2.1 for row in rows]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    strips = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for strip, row in zip(strips, rows, strict=True):
        for axes, panel in zip(strip.subplots(1, len(row), squeeze=False)[0], row, strict=True):
            panel(axes, history)
            _epoch_axis(axes, history)
    return figure


def _curve(axes: Axes, history: History, key: str, **line: Any) -> None:
    points = [(row["epoch"], row[key]) for row in history if key in row and math.isfinite(row[key])]
    if points:
        marker = "o" if len(points) <= MARKERS_UP_TO else ""
        axes.plot(*zip(*points, strict=True), marker=marker, clip_on=False, zorder=3, **line)


def _epoch_axis(axes: Axes, history: History) -> None:
    first, last = min(row["epoch"] for row in history), max(row["epoch"] for row in history)
    margin = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_xlabel(say("epoch"))


def _loss_panel(axes: Axes, history: History) -> None:
    _curve(axes, history, "train_loss", color=BLUE, label=say("train"))
    _curve(axes, history, "task_loss", color=SKY, linestyle=":", label=say("train, task part only"))
    _curve(axes, history, "val_loss", color=VERMILLION, linestyle="--", label=say("validation"))
    axes.set_title(say("Loss"))
    _legend(axes)


def _accuracy_panel(axes: Axes, history: History, title: str) -> None:
    _curve(axes, history, "train_accuracy", color=BLUE, label=say("train"))
    _curve(axes, history, "val_accuracy", color=VERMILLION, linestyle="--", label=say("validation"))
    validated = [row for row in history if math.isfinite(row.get("val_accuracy", math.nan))]
    if validated:
        best = max(validated, key=lambda row: row["val_accuracy"])
        label = say("best: {accuracy:.1%}, epoch {epoch:g}", accuracy=best["val_accuracy"], epoch=best["epoch"])
        star = {"marker": "*", "markersize": 12, "color": VERMILLION, "markeredgecolor": theme().ground}
        axes.plot(best["epoch"], best["val_accuracy"], linestyle="", zorder=4, label=label, **star)
    axes.set_title(_accuracy_title(title))
    axes.yaxis.set_major_formatter(style.percent_tick)
    _legend(axes)


def _learning_rate_panel(axes: Axes, history: History) -> None:
    _curve(axes, history, "lr", color=BLUE, label=say("at the epoch's end"))
    _curve(axes, history, "peak_lr", color=VERMILLION, linestyle="--", label=say("highest of the epoch"))
    axes.set_title(say("Learning rate"))
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
    axes.yaxis.set_major_formatter("{x:g}")
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Below the panel: within it, it would hide points where they are few."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.2)


def _auxiliary_panel(axes: Axes, history: History, key: str) -> None:
    _curve(axes, history, key, color=theme().ink)
    axes.set_title(_auxiliary_title(key))


def _accuracy_title(accuracy: str) -> str:
    known = {"Accuracy": say("Accuracy"), "Next-token accuracy": say("Next-token accuracy")}
    return known.get(accuracy, accuracy)


def _auxiliary_title(key: str) -> str:
    known = {
        "router_z_loss": say("Router z-loss"),
        "router_balance_loss": say("Load balance loss"),
        "router_guidance_loss": say("Router guidance loss"),
        "cross_modal_loss": say("Cross-modal alignment loss"),
        "contrastive_loss": say("Contrastive loss"),
    }
    return known.get(key, key.replace("_", " ").capitalize())


@styled()
def confusion_matrix(matrix: Tensor | ArrayLike, class_names: Sequence[str]) -> Figure:
    """How to read it: a row is a true class, a coloured cell off the diagonal the class that it is mistaken for.

    `matrix` (C, C): counts, true class by predicted class. The colour is the share of the row. Up to 20 classes the
    counts are written in the cells (none for 0); the side grows with C up to a page, then only some classes are named.
    """
    counts = np.asarray(matrix)
    _check_names(class_names, len(counts))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = min(max(0.5, 3 / len(counts)) if len(counts) <= 20 else 0.16, 16 / len(counts))
    names = style.labels(class_names)
    longest = max(style.inches(name, style.SMALL) for name in names)
    side = cell * len(counts)
    line_height = style.SMALL * 1.3 / 72
    is_flat = longest < cell * 0.9
    below = line_height if is_flat else longest
    figure = Figure(figsize=(side + longest + 1.8, side + below + 1), layout="compressed")
    axes = figure.add_subplot()
    # The root makes a share of 5% visible, which is where confusions are.
    image = axes.imshow(shares, cmap=theme().shares, norm=PowerNorm(0.5, vmin=0, vmax=1))
    if len(counts) <= 20:
        _write_counts(axes, counts, image.to_rgba(shares), cell)
    ticks = np.arange(0, len(counts), math.ceil(line_height / cell))
    shown = [names[tick] for tick in ticks]
    axes.set_yticks(ticks, shown)
    axes.set_xticks(ticks, shown, rotation=0 if is_flat else 90)
    axes.set(xlabel=say("predicted class"), ylabel=say("true class"), title=say("Confusion matrix"))
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, shrink=min(1, 3 / side), aspect=15, pad=0.25 / side, ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(style.percent_tick)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label(say("share of the true class"))
    return figure


def _write_counts(axes: Axes, counts: NDArray[Any], colors: Any, cell: float) -> None:
    size = min(style.FONT_SIZE, 0.85 * cell * 72 / (style.GLYPH_WIDTH * len(str(counts.max()))))
    for row, column in np.argwhere(counts):
        color = ink_on(colors[row, column])
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=size)


def _check_names(class_names: Sequence[str], num_classes: int) -> None:
    if len(class_names) != num_classes:
        raise ValueError(f"there are {len(class_names)} class names for {num_classes} classes")


@styled()
def prediction_grid(images: Tensor, labels: Tensor, probabilities: Tensor, class_names: Sequence[str]) -> Figure:
    """How to read it: under each picture is what the model takes it for and how sure it is; ✗ names the true class too.

    `images` (N, 1 or 3, H, W) uint8, `labels` (N,) int64, `probabilities` (N, C) from 0 to 1. `pick_examples` chooses
    which pictures to show.
    """
    if len(images) == 0:
        raise ValueError("there are no pictures to draw")
    _check_names(class_names, probabilities.shape[1])
    columns = min(6, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.6 * columns + 0.2, 1.96 * rows + 0.1), layout="constrained")
    names = style.labels(class_names, max_width=15)
    confidence, predicted = probabilities.max(dim=1)
    for i, picture in enumerate(images.permute(0, 2, 3, 1).numpy()):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        is_right = bool(predicted[i] == labels[i])
        color = theme().right if is_right else theme().wrong
        mark = style.RIGHT if is_right else style.WRONG
        truth = "" if is_right else say("true: {name}", name=names[int(labels[i])])
        guess = f"{mark} {names[int(predicted[i])]} ({confidence[i]:.0%})"
        axes.set_xlabel(f"{guess}\n{truth}", color=color, fontsize=style.SMALL)
        axes.spines[:].set(visible=True, color=color, linewidth=2)
    return figure


@styled()
def reliability_diagram(predictions: Predictions, bins: int = CALIBRATION_BINS) -> Figure:
    """How to read it: a bar that ends on the diagonal is a model as right as it is sure; below it, one too sure.

    The title has the expected calibration error; the lower panel how many predictions each bin of confidence has.
    """
    binned = calibration_bins(predictions, bins)
    filled = np.flatnonzero(binned.count.numpy())
    accuracy, confidence = binned.accuracy.numpy()[filled], binned.confidence.numpy()[filled]
    bar: dict[str, Any] = {"width": 0.92 / bins, "zorder": 2}
    centers = (filled + 0.5) / bins
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    upper.bar(centers, accuracy, color=SKY, label=say("accuracy"), **bar)
    # Opaque: it may lie over the bar, and must look as in the legend.
    hatched = {
        "facecolor": theme().over_ground(VERMILLION, 0.25),
        "edgecolor": VERMILLION,
        "hatch": "////",
        "zorder": 3,
    }
    upper.bar(centers, confidence - accuracy, bottom=accuracy, label=say("gap to confidence"), **(bar | hatched))
    upper.plot(
        [0, 1], [0, 1], color=theme().ink, linestyle="--", linewidth=1, label=say("perfectly calibrated"), zorder=4
    )
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel=say("accuracy"))
    upper.set_title(say("Calibration: expected error {error:.1%}", error=calibration_error(predictions, bins)))
    figure.legend(loc="outside lower center", ncols=3)
    upper.yaxis.set_major_formatter(style.percent_tick)
    share = binned.count.numpy()[filled] / len(predictions.labels)
    lower.bar(centers, share, color=theme().muted, **bar)
    lower.set(xlabel=say("confidence"), ylabel=say("predictions"))
    for axis in (lower.xaxis, lower.yaxis):
        axis.set_major_formatter(style.percent_tick)
    return figure


@styled()
def per_class(
    precision: Tensor | ArrayLike, recall: Tensor | ArrayLike, class_names: Sequence[str], most: int = 50
) -> Figure:
    """How to read it: the classes that the model does worst on are at the bottom; a long bar is a lopsided class.

    Recall left of precision: pictures of the class are missed; right of it: others are taken for it. `precision` and
    `recall` (C,) from 0 to 1. Sorted by their harmonic mean (F1); where C is over `most`, the worst are shown.
    """
    precisions, recalls = np.asarray(precision, dtype=float), np.asarray(recall, dtype=float)
    _check_names(class_names, len(precisions))
    f1 = 2 * precisions * recalls / np.maximum(precisions + recalls, 1e-12)
    worst = np.argsort(f1, kind="stable")[:most]
    names = style.labels(class_names)
    rows = np.arange(len(worst))
    figure = Figure(figsize=(7, 0.24 * len(worst) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    axes.hlines(rows, precisions[worst], recalls[worst], color=theme().muted, linewidth=2, zorder=2)
    plot = partial(axes.plot, linestyle="", clip_on=False, zorder=3)
    plot(precisions[worst], rows, marker="o", color=BLUE, markersize=8, label=say("precision"))
    plot(recalls[worst], rows, marker="D", color=ORANGE, markersize=4.5, label=say("recall"))
    axes.set_yticks(rows, [names[number] for number in worst])
    axes.set_ylim(-0.7, len(worst) - 0.3)
    axes.set_xlim(min(0.9, precisions[worst].min() - 0.02, recalls[worst].min() - 0.02), 1)
    axes.xaxis.set_major_formatter(style.percent_tick)
    some = say("The {shown} weakest of {all} classes", shown=len(worst), all=len(precisions))
    axes.set_title(say("Precision and recall by class") if len(worst) == len(precisions) else some)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return figure


def save(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write `figure` in the format of the suffix (.png, .svg, .pdf), making the folder, and return the path.

    The file appears whole or not at all. Raises `UserError` where it cannot be written or the format is unknown.
    """
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in formats:
        raise UserError(f"{path}: a figure's name must end in one of {', '.join('.' + name for name in formats)}")
    with styled():
        write_atomically(path, lambda unfinished: figure.savefig(unfinished, format=kind, dpi=dpi))
    return path
