"""What is drawn equals the data, can be read, and is saved whole or not at all."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from tests.visualization.readable import assert_apart

from diffmoe.config import UserError
from diffmoe.evaluation.classification import Predictions, calibration_bins, calibration_error
from diffmoe.visualization import (
    confusion_matrix,
    per_class,
    prediction_grid,
    reliability_diagram,
    save,
    style,
    training_curves,
)
from diffmoe.visualization.colors import LIGHT

AUXILIARY = ("router_z_loss", "router_balance_loss", "cross_modal_loss", "contrastive_loss")
LONG_NAME = "a name that goes on for much longer than any label can"


def history(epochs: int) -> list[dict[str, float]]:
    keys = ("train_loss", "task_loss", "val_loss", "train_accuracy", "val_accuracy", "lr", "peak_lr", *AUXILIARY)
    values = np.random.default_rng(0).uniform(0.1, 0.9, (epochs, len(keys)))
    return [{"epoch": epoch, **dict(zip(keys, row, strict=True))} for epoch, row in enumerate(values.tolist(), 1)]


def confusions(num_classes: int) -> np.ndarray:
    counts = np.random.default_rng(1).integers(0, 30, (num_classes, num_classes))
    return counts + np.diag(np.full(num_classes, 900))


def visible_texts(axes: Axes) -> list[Text]:
    """Titles, axis labels, texts, and the labels of ticks inside the view."""
    ticks = [
        tick.label1
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    titles = [axes.title, axes._left_title, axes._right_title]  # pyright: ignore[reportAttributeAccessIssue]
    texts = [*ticks, *titles, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    return [text for text in texts if text.get_text().strip() and text.get_visible()]


def assert_readable(figure: Figure) -> None:
    """No text overlaps another one or leaves the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for axes in figure.axes for text in visible_texts(axes)]
    assert_apart(canvas, texts)


def lines_by_label(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in axes.get_lines()
    }


def drawn_image(axes: Axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


class TestTrainingCurves:
    @pytest.mark.parametrize("epochs", [1, 7, 200])
    def test_lines_are_the_history(self, epochs: int):
        rows = history(epochs)
        loss, accuracy, rate, *auxiliary = training_curves(rows).axes

        def column(key: str) -> tuple[list[float], list[float]]:
            return [row["epoch"] for row in rows], [row[key] for row in rows]

        assert lines_by_label(loss) == {
            "train": column("train_loss"),
            "train, task part only": column("task_loss"),
            "validation": column("val_loss"),
        }
        assert lines_by_label(accuracy)["train"] == column("train_accuracy")
        assert lines_by_label(accuracy)["validation"] == column("val_accuracy")
        assert lines_by_label(rate) == {"at the epoch's end": column("lr"), "highest of the epoch": column("peak_lr")}
        assert rate.get_ylim()[1] > max(row["peak_lr"] for row in rows)
        for axes, key in zip(auxiliary, AUXILIARY, strict=True):
            assert list(lines_by_label(axes).values()) == [column(key)]

    def test_the_first_best_epoch_is_marked(self):
        rows = [{"epoch": epoch, "val_accuracy": value} for epoch, value in ((1, 0.5), (2, 0.912), (3, 0.912))]
        (axes,) = training_curves(rows).axes
        assert lines_by_label(axes)["best: 91.2%, epoch 2"] == ([2], [0.912])

    @pytest.mark.parametrize("epochs", [1, 7, 200])
    def test_readable(self, epochs: int):
        assert_readable(training_curves(history(epochs)))

    def test_few_points_have_markers(self):
        assert training_curves(history(1)).axes[0].get_lines()[0].get_marker() == "o"
        assert training_curves(history(200)).axes[0].get_lines()[0].get_marker() == ""

    @pytest.mark.parametrize("epochs", [1, 2, 7])
    def test_no_legend_hides_a_point(self, epochs: int):
        figure = training_curves(history(epochs))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        panels = [(axes, legend) for axes in figure.axes if (legend := axes.get_legend())]
        assert len(panels) == 3
        for axes, box in panels:
            legend = box.get_window_extent(canvas.get_renderer())
            points = [axes.transData.transform(line.get_xydata()) for line in axes.get_lines()]
            assert not any(legend.contains(*point) for of_line in points for point in of_line)
            assert legend.y0 >= 0
            assert not legend.overlaps(axes.xaxis.label.get_window_extent(canvas.get_renderer()))

    def test_what_is_missing_or_nan_leaves_no_empty_panel(self):
        rows = [{"epoch": 1, "train_loss": 2.0, "lr": math.nan}, {"epoch": 2, "train_loss": math.nan, "z_loss": 0.3}]
        loss, auxiliary = training_curves(rows).axes
        assert lines_by_label(loss) == {"train": ([1], [2.0])}
        assert list(lines_by_label(auxiliary).values()) == [([2], [0.3])]

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="nothing to draw"):
            training_curves([{"epoch": 1}])


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """WCAG 2.1's contrast ratio of two RGB colours, 1 to 21."""

    def luminance(rgb: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


class TestConfusionMatrix:
    @pytest.mark.parametrize("num_classes", [2, 20])
    def test_cells_are_the_counts(self, num_classes: int):
        counts = confusions(num_classes)
        counts[0, 1] = 0
        axes = confusion_matrix(counts, [str(i) for i in range(num_classes)]).axes[0]
        written = np.zeros_like(counts)
        for text in axes.texts:
            column, row = text.get_position()
            written[int(row), int(column)] = int(text.get_text())
        assert (written == counts).all()
        assert len(axes.texts) == np.count_nonzero(counts)
        np.testing.assert_allclose(drawn_image(axes), counts / counts.sum(axis=1, keepdims=True))

    def test_a_tensor_and_a_class_without_pictures(self):
        axes = confusion_matrix(torch.tensor([[3, 1], [0, 0]]), ["a", "b"]).axes[0]
        np.testing.assert_allclose(drawn_image(axes), [[0.75, 0.25], [0, 0]])

    def test_counts_can_be_read_on_every_shade(self):
        counts = np.zeros((20, 20), dtype=int)
        counts[:, 0] = np.arange(25, 1000, 50)
        counts[:, 1] = 1000 - counts[:, 0]
        axes = confusion_matrix(counts, [str(i) for i in range(20)]).axes[0]
        for text in axes.texts:
            column, row = map(int, text.get_position())
            background = axes.images[0].to_rgba(counts[row, column] / 1000)
            assert contrast(tuple(background)[:3], to_rgb(text.get_color())) > 3.9

    @pytest.mark.parametrize(
        ("num_classes", "name"),
        [
            (2, ""),
            (2, LONG_NAME),
            (10, ""),
            (10, "class "),
            (10, LONG_NAME),
            (20, LONG_NAME),
            (21, ""),
            (300, "class "),
        ],
    )
    def test_readable(self, num_classes: int, name: str):
        assert_readable(confusion_matrix(confusions(num_classes), [f"{name}{i}" for i in range(num_classes)]))

    def test_names_of_another_number_of_classes(self):
        with pytest.raises(ValueError, match="3 class names for 2 classes"):
            confusion_matrix(np.eye(2), ["a", "b", "c"])


class TestPredictionGrid:
    @pytest.mark.parametrize(("count", "channels"), [(1, 1), (4, 3), (13, 1)])
    def test_pictures_and_marks(self, count: int, channels: int):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, channels, 5, 6), generator=generator, dtype=torch.uint8)
        labels = torch.randint(3, (count,), generator=generator)
        probabilities = torch.rand(count, 3, generator=generator).softmax(dim=1)
        names = ["cat", "dog", LONG_NAME]
        figure = prediction_grid(images, labels, probabilities, names)
        assert_readable(figure)
        drawn = style.labels(names, max_width=15)
        wrong = 0
        for i, axes in enumerate(figure.axes):
            assert (np.atleast_3d(drawn_image(axes)) == images[i].permute(1, 2, 0).numpy()).all()
            guess, truth = axes.get_xlabel().split("\n")
            confidence, predicted = probabilities[i].max(dim=0)
            is_right = predicted == labels[i]
            wrong += not is_right
            assert guess == f"{'✓' if is_right else '✗'} {drawn[int(predicted)]} ({confidence.item():.0%})"
            assert truth == ("" if is_right else f"true: {drawn[int(labels[i])]}")
            color = LIGHT.right if is_right else LIGHT.wrong
            assert axes.xaxis.label.get_color() == color
            assert axes.spines["left"].get_edgecolor()[:3] == to_rgb(color)
        assert len(figure.axes) == count
        assert wrong == (probabilities.argmax(dim=1) != labels).sum()

    def test_no_pictures(self):
        with pytest.raises(ValueError, match="no pictures"):
            prediction_grid(torch.empty(0, 1, 4, 4, dtype=torch.uint8), torch.empty(0), torch.empty(0, 2), ["a", "b"])


def test_reliability_diagram():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=generator)
    logits = 2 * torch.randn(300, 4, generator=generator)
    logits[torch.arange(300), labels] += 1
    predictions = Predictions(logits, labels)
    figure = reliability_diagram(predictions)
    assert_readable(figure)
    upper, lower = figure.axes
    binned = calibration_bins(predictions)
    filled = binned.count > 0
    accuracies, gaps = upper.containers
    np.testing.assert_allclose([bar.get_height() for bar in accuracies], binned.accuracy[filled], rtol=1e-6)
    ends = [bar.get_y() + bar.get_height() for bar in gaps]
    np.testing.assert_allclose(ends, binned.confidence[filled], rtol=1e-6)
    np.testing.assert_allclose([bar.get_height() * 300 for bar in lower.containers[0]], binned.count[filled], rtol=1e-6)
    in_legend = [tuple(patch.get_facecolor()) for patch in figure.legends[0].get_patches()]
    for bars, color in zip((accuracies, gaps), in_legend, strict=True):
        assert {tuple(bar.get_facecolor()) for bar in bars} == {color}
        assert color[3] == 1  # over another bar it looks as in the legend
    assert upper.get_title(loc="left") == f"Calibration: expected error {calibration_error(predictions):.1%}"


class TestPerClass:
    def test_marks_are_the_values_from_worst_to_best(self):
        # F1: a 0.6, b 0, c 0.9, d 0.5
        precision, recall = [0.6, 0.0, 0.9, 1.0], torch.tensor([0.6, 0.0, 0.9, 1 / 3])
        axes = per_class(precision, recall, ["a", "b", "c", "d"]).axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "d", "a", "c"]
        lines = lines_by_label(axes)
        np.testing.assert_allclose(lines["precision"][0], [0, 1, 0.6, 0.9])
        np.testing.assert_allclose(lines["recall"][0], [0, 1 / 3, 0.6, 0.9])

    def test_of_many_classes_the_weakest(self):
        values = np.linspace(0.2, 1, 100)
        axes = per_class(values, values, [str(i) for i in range(100)]).axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == [str(i) for i in range(50)]
        assert axes.get_title(loc="left") == "The 50 weakest of 100 classes"

    @pytest.mark.parametrize("num_classes", [2, 10, 100])
    def test_readable(self, num_classes: int):
        values = np.linspace(0.99, 1, num_classes)
        assert_readable(per_class(values, values[::-1], [f"{LONG_NAME}{i}" for i in range(num_classes)]))


class TestLabels:
    def test_short_names_stay(self):
        assert style.labels(["cat", " T-shirt/top\n", "x" * 24]) == ["cat", "T-shirt/top", "x" * 24]

    def test_long_names_keep_both_ends_and_fit(self):
        for shown in style.labels([LONG_NAME, LONG_NAME + " 2"]):
            assert style.width(shown) <= 24
            assert shown.startswith("a name")
        assert len(set(style.labels([LONG_NAME + " 1", LONG_NAME + " 2"]))) == 2

    @pytest.mark.usefixtures("only_base_font")
    def test_without_a_font_the_class_number_and_one_warning(self, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.WARNING):
            assert style.labels(["猫", "dog", "狗"]) == ["class 0", "dog", "class 2"]
            FigureCanvasAgg(confusion_matrix(np.eye(2, dtype=int), ["猫", "狗"])).draw()  # no glyph warning: an error
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "Noto Sans CJK" in caplog.text

    def test_marks_can_be_drawn(self):
        assert {ord(style.RIGHT), ord(style.WRONG), ord("…")} <= style._drawable()

    def test_a_dollar_is_no_formula(self):
        figure = confusion_matrix(np.eye(2, dtype=int), ["$x^2$", r"$\oops$"])
        FigureCanvasAgg(figure).draw()
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["$x^2$", r"$\oops$"]


class TestSave:
    def test_png_and_svg_in_a_new_folder(self, tmp_path: Path):
        figure = training_curves(history(3))
        png = save(figure, tmp_path / "new" / "folder" / "curves.png")
        svg = save(figure, str(tmp_path / "curves.SVG"))
        assert png.read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in svg.read_bytes()
        assert [path.name for path in png.parent.iterdir()] == ["curves.png"]

    def test_dpi_is_the_size(self, tmp_path: Path):
        from PIL import Image

        figure = training_curves(history(1))
        with Image.open(save(figure, tmp_path / "curves.png", dpi=50)) as picture:
            assert picture.width == 50 * figure.get_size_inches()[0]

    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = tmp_path / "curves.png"
        path.write_bytes(b"old")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left"):
            save(training_curves(history(1)), path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"curves.png": b"old"}

    def test_a_folder_that_cannot_be_is_one_line(self, tmp_path: Path):
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(UserError, match=r"taken.* cannot be written") as caught:
            save(training_curves(history(1)), tmp_path / "taken" / "curves.png")
        assert "\n" not in str(caught.value)

    def test_an_unknown_format(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"\.png"):
            save(training_curves(history(1)), tmp_path / "curves.docx")


def test_matplotlib_settings_are_left_alone():
    before = dict(matplotlib.rcParams)
    FigureCanvasAgg(training_curves(history(2))).draw()
    assert dict(matplotlib.rcParams) == before
