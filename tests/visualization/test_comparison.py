"""What the figures of a comparison draw equals its JSON."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tests.visualization.readable import assert_apart

from diffmoe.visualization import comparison
from diffmoe.visualization.language import speaking


def arm(score: list[float], flops: int, seconds: list[float], parameters: int) -> dict[str, Any]:
    def told(values: list[float]) -> dict[str, Any]:
        return {"mean": sum(values) / len(values), "std": 0.5 if len(values) > 1 else None, "values": values}

    costs = {"flops_per_image": flops, "parameters_total": parameters}
    return {"test_accuracy": told(score), "train_seconds": told(seconds), **costs}


ARMS = {"moe": arm([0.9, 0.8], 2000, [10.0, 20.0], 500), "cnn": arm([0.7, 0.6], 1000, [4.0, 8.0], 100)}
HEALTH = {
    "moe": [
        [
            {"epoch": 1, "min_load": 0.5, "max_load": 2.0},
            {"epoch": 2, "min_load": 0.8, "max_load": 1.2, "flutter": 0.5},
        ],
        [
            {"epoch": 1, "min_load": 0.7, "max_load": 1.6},
            {"epoch": 2, "min_load": 0.6, "max_load": 1.4, "flutter": 0.1},
        ],
    ],
    "cnn": [[], []],
}


def test_every_seed_and_every_mean_is_where_it_was_measured() -> None:
    flops, seconds, parameters = comparison.score_against_cost(ARMS, "test_accuracy").axes
    for axes, costs in ((flops, [2000, 2000]), (seconds, [10, 20]), (parameters, [500, 500])):
        dots = axes.lines[0]
        assert (list(dots.get_xdata()), list(dots.get_ydata())) == (costs, [0.9, 0.8])  # pyright: ignore
        means = [container.lines[0] for container in axes.containers]  # pyright: ignore
        assert [line.get_ydata()[0] for line in means] == pytest.approx([0.85, 0.65])  # pyright: ignore
        assert means[0].get_xdata()[0] == sum(costs) / 2  # pyright: ignore


def test_one_seed_has_no_bar() -> None:
    figure = comparison.score_against_cost({"moe": arm([0.5], 10, [1.0], 5)}, "test_accuracy")
    assert [len(axes.containers) for axes in figure.axes] == [1, 1, 1]


def many(count: int) -> dict[str, dict[str, Any]]:
    """Contenders whose seconds are decades apart, or all alike."""
    return {
        f"contender {n}": arm([0.9 - 0.01 * n, 0.8], 1, [10.0 ** (n % 4), 12.0 ** (n % 4)], 1) for n in range(count)
    }


def test_every_contender_is_at_its_time_and_accuracy() -> None:
    figure = comparison.accuracy_against_time({"digits": ARMS, "cifar10": many(1)})
    digits, cifar10 = figure.axes
    assert (digits.get_title("left"), cifar10.get_title("left")) == ("digits", "cifar10")
    assert digits.get_xscale() == "log"
    means = [container.lines[0].get_xydata()[0].tolist() for container in digits.containers]  # pyright: ignore
    assert means == [pytest.approx([15, 0.85]), pytest.approx([6, 0.65])]
    assert digits.lines[0].get_xydata().tolist() == [[10, 0.9], [20, 0.8]]  # pyright: ignore
    low, high = digits.get_xlim()
    assert low < 4 < 20 < high


@pytest.mark.parametrize("counts", [(1,), (2, 12, 1), (3, 1, 2, 7)])
def test_what_is_written_beside_contenders_can_be_read(counts: tuple[int, ...]) -> None:
    figure = comparison.accuracy_against_time({f"a set called {n}": many(n) for n in counts})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert len(figure.axes) == len(counts)
    texts, looks = [], []
    for axes, count in zip(figure.axes, counts, strict=True):
        ticks = [tick for tick in axes.get_xticklabels() if tick.get_text()]
        low, high = axes.get_xlim()
        shown = [tick for tick in ticks if low <= tick.get_position()[0] <= high]
        assert shown
        legend = axes.get_legend()
        assert legend is not None
        texts += [*shown, axes.xaxis.label, axes.title, *legend.get_texts()]
        lines = [container.lines[0] for container in axes.containers]  # pyright: ignore
        looks = [(line.get_color(), line.get_marker()) for line in lines]
        assert len(set(looks)) == count  # no two alike
    assert_apart(canvas, texts)


def test_routers_are_the_means_over_seeds_and_dense_arms_have_none() -> None:
    figure = comparison.routers_over_time(HEALTH)
    flutter, load = figure.axes
    (line,) = flutter.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2], [pytest.approx(0.3)])  # pyright: ignore
    most, least, fair = load.lines
    assert list(most.get_ydata()) == pytest.approx([1.8, 1.3])  # pyright: ignore
    assert list(least.get_ydata()) == pytest.approx([0.6, 0.7])  # pyright: ignore
    assert set(fair.get_ydata()) == {1}  # pyright: ignore
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["moe"]


def test_they_can_be_drawn_in_both_languages() -> None:
    for language in ("en", "zh"):
        with speaking(language):
            for figure in (
                comparison.score_against_cost(ARMS, "test_accuracy"),
                comparison.accuracy_against_time({"digits": ARMS}),
                comparison.routers_over_time(HEALTH),
            ):
                figure.canvas.draw()  # pyright: ignore
