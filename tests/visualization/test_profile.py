"""What the figures of a profile draw equals the profile."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tests.visualization.readable import assert_apart

from diffmoe.profiling.parts import ORDER
from diffmoe.visualization import profile, style
from diffmoe.visualization.colors import BLUE, VERMILLION
from diffmoe.visualization.language import speaking

COSTS: list[dict[str, Any]] = [
    {"part": "data loading", "once_ms": 2.0, "held_bytes": 0},
    {
        **{"part": "patch embedding", "forward_flops": 8_000_000, "backward_flops": 16_000_000},
        **{"forward_ms": 3.0, "backward_ms": 5.0, "once_ms": 0.0, "held_bytes": 4_000_000},
    },
    {
        **{"part": "routed experts", "forward_flops": 6_000_000, "backward_flops": 10_000_000},
        **{"forward_ms": 4.0, "backward_ms": 6.0, "once_ms": 0.0, "held_bytes": 3_000_000},
    },
    {"part": "other", "forward_ms": 1.0, "held_bytes": -1_000_000},
]
SPEEDS: list[dict[str, Any]] = [
    {"model": model, "mode": mode, "batch_size": size, "images_per_second": 1 / (seconds * factor)}
    for mode, factor in (("inference", 1.0), ("training", 3.0))
    for size in (1, 8, 64)
    for model, seconds in (("moe", 0.02), ("dense", 0.01))
]


def bars(axes: Axes, which: int) -> list[tuple[float, float]]:
    return [(bar.get_x(), bar.get_width()) for bar in axes.containers[which]]  # pyright: ignore


def shares(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_costs_are_drawn_as_they_were_measured() -> None:
    flops, time, memory = profile.costs_by_part(COSTS).axes
    assert bars(flops, 0) == [(0, 0), (0, 8), (0, 6), (0, 0)]
    assert bars(flops, 1) == [(0, 0), (8, 16), (6, 10), (0, 0)]
    assert shares(flops) == ["", "60.0%", "40.0%", ""]
    assert bars(time, 0) == [(0, 0), (0, 3), (0, 4), (0, 1)]
    assert bars(time, 1) == [(0, 0), (3, 5), (4, 6), (1, 0)]
    assert bars(time, 2) == [(0, 2), (8, 0), (10, 0), (1, 0)]
    assert shares(time) == ["9.5%", "38.1%", "47.6%", "4.8%"]  # of 21 ms
    assert bars(memory, 3) == [(0, 0), (0, 4), (0, 3), (0, -1)]
    assert shares(memory) == ["", "66.7%", "50.0%", "-16.7%"]
    assert [label.get_text() for label in flops.get_yticklabels()] == [cost["part"] for cost in COSTS]


def test_throughput_beside_dense() -> None:
    figure = profile.throughput(SPEEDS)
    for axes, factor in zip(figure.axes, (1, 3), strict=True):
        moe, dense = axes.lines
        assert list(moe.get_ydata()) == pytest.approx([50 / factor] * 3)  # pyright: ignore
        assert list(dense.get_ydata()) == pytest.approx([100 / factor] * 3)  # pyright: ignore
        assert (moe.get_color(), dense.get_color()) == (BLUE, VERMILLION)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8", "64"]


def test_a_dense_model_alone() -> None:
    figure = profile.throughput([speed for speed in SPEEDS if speed["model"] == "dense"])
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense model"]


def test_a_part_is_called_by_its_name() -> None:
    figure = profile.costs_by_part([{**COSTS[1], "part": part} for part in ORDER])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ORDER


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_overlaps(language: str) -> None:
    with speaking(language):  # pyright: ignore[reportArgumentType]
        figures = [profile.costs_by_part(COSTS), profile.throughput(SPEEDS)]
    with style.styled():
        for figure in figures:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            texts = figure.legends[0].get_texts()
            for axes in figure.axes:
                low, high = sorted(axes.get_ylim())
                texts += [text for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
                texts += [*axes.texts, axes.xaxis.label]
            assert_apart(canvas, [text for text in texts if text.get_text() and text.get_visible()])
