"""What the figures of a profile draw equals the profile."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D

from diffmoe.profiling.profile import PartCost
from diffmoe.profiling.throughput import Speed
from diffmoe.visualization import profile, style
from diffmoe.visualization.language import speaking

COSTS = [
    PartCost("", "data loading", once_ms=2.0),
    PartCost("", "patch embedding", 100, 100, 8_000_000, 16_000_000, 0, 3.0, 5.0, 0.0, 4e6),
    PartCost("", "routed experts", 4000, 1000, 6_000_000, 10_000_000, 99, 4.0, 6.0, 0.0, 3e6),
    PartCost("", "residual", held_bytes=-1e6, forward_ms=1.0),
    PartCost("", "fusion", 7, 7, 0, 0, 0, 0, 0, 0, 0),
]
SPEEDS = [
    Speed(model, mode, size, tuple(size * seconds * noise for noise in (1.0, 1.1, 0.9)))
    for mode, factor in (("inference", 1.0), ("training", 3.0))
    for size in (1, 8, 64)
    for model, seconds in (("moe", 0.02 * factor), ("dense", 0.01 * factor))
]


def points(line: Line2D, axis: str) -> list[float]:
    return np.asarray(line.get_xdata() if axis == "x" else line.get_ydata()).tolist()


def drawn_rows(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_time_is_drawn_as_it_was_measured() -> None:
    axes = profile.time_by_part(COSTS).axes[0]
    forward, backward, once = axes.containers
    assert [bar.get_width() for bar in forward] == [0, 3, 4, 1]  # what took no time has no row
    assert [(bar.get_x(), bar.get_width()) for bar in backward] == [(0, 0), (3, 5), (4, 6), (1, 0)]
    assert [bar.get_x() + bar.get_width() for bar in once] == [2, 8, 10, 1]
    assert [text.get_text() for text in axes.texts] == ["9.5%", "38.1%", "47.6%", "4.8%"]  # of 21 ms
    assert drawn_rows(axes) == ["data loading", "patch embedding", "routed experts", "residual sums"]


def test_held_memory_is_drawn_as_it_was_measured() -> None:
    axes = profile.memory_by_part(COSTS).axes[0]
    assert [bar.get_width() for bar in axes.containers[0]] == [4, 3, -1]
    assert [text.get_text() for text in axes.texts] == ["66.7%", "50.0%", "-16.7%"]


def test_shares_of_flops_and_of_time() -> None:
    axes = profile.flops_against_time(COSTS).axes[0]
    flops, time = axes.lines
    assert points(flops, "x") == [0, 24 / 40, 16 / 40, 0]
    assert points(time, "x") == pytest.approx([2 / 21, 8 / 21, 10 / 21, 1 / 21])
    assert drawn_rows(axes)[-1] == "residual sums"


def test_throughput_beside_dense() -> None:
    figure = profile.throughput(SPEEDS)
    inference, training, inference_ratio, training_ratio = figure.axes
    for axes, factor in ((inference, 1), (training, 3)):
        moe, dense = axes.lines
        assert points(moe, "x") == [1, 8, 64]
        assert points(moe, "y") == pytest.approx([50 / factor] * 3)
        assert points(dense, "y") == pytest.approx([100 / factor] * 3)
        assert (moe.get_color(), dense.get_color()) == (style.BLUE, style.VERMILLION)
    for axes in (inference_ratio, training_ratio):
        assert points(axes.lines[0], "y") == pytest.approx([2] * 3)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8", "64"]


def test_a_dense_model_alone_has_no_ratio() -> None:
    figure = profile.throughput([speed for speed in SPEEDS if speed.model == "dense"])
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]


def test_the_table_s_numbers() -> None:
    texts = [text.get_text() for text in profile.cost_table(COSTS, 8).axes[0].texts]
    rows = [texts[start : start + 9] for start in range(0, len(texts), 9)]
    assert rows[2] == ["patch embedding", "100", "100", "1.000", "2.000", "3.00", "5.00", "8.00", "4.00"]
    assert rows[1] == ["data loading", "", "", "", "", "", "", "2.00", ""]
    assert len(rows) == 1 + len(COSTS)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_overlaps(language: str) -> None:
    with speaking(language):  # pyright: ignore[reportArgumentType]
        figures = [
            profile.time_by_part(COSTS),
            profile.memory_by_part(COSTS),
            profile.flops_against_time(COSTS),
            profile.throughput(SPEEDS),
            profile.cost_table(COSTS, 8),
        ]
    with style.styled():
        for figure in figures:
            renderer = FigureCanvasAgg(figure).get_renderer()
            figure.draw(renderer)
            for axes in figure.axes:
                labels = axes.get_yticklabels() if axes.axison else []
                low, high = sorted(axes.get_ylim())
                labels = [label for label in labels if low <= label.get_position()[1] <= high]
                shown = [text for text in (*axes.texts, *labels) if text.get_text()]
                boxes = [text.get_window_extent(renderer) for text in shown]
                for number, box in enumerate(boxes):
                    assert not any(box.overlaps(other) for other in boxes[:number]), shown[number].get_text()
                    assert figure.bbox.containsx(box.x0)
                    assert figure.bbox.containsx(box.x1)


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        profile.memory_by_part([PartCost("", "head", forward_ms=1.0)])
