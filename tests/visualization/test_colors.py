"""In the dark a figure is dark and can be read, and the colours of its data are those of the light."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from tests.visualization import test_experts
from tests.visualization.test_attention import random_maps, random_rows
from tests.visualization.test_embedding import clusters
from tests.visualization.test_experts import block, blocks
from tests.visualization.test_figures import confusions, contrast, history
from tests.visualization.test_profile import COSTS, SPEEDS

from diffmoe import visualization as drawn
from diffmoe.evaluation.classification import Predictions
from diffmoe.evaluation.history import routing_metrics
from diffmoe.visualization.colors import DARK, LIGHT, THEMES, Theme, ink_on, shown_in, theme
from diffmoe.visualization.patches import routing_picture

BLACK_PICTURE = torch.zeros(3, 16, 16, dtype=torch.uint8)
PICTURES = BLACK_PICTURE.expand(12, -1, -1, -1)
LABELS = torch.arange(40) % 4
LOGITS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

FIGURES: dict[str, Callable[[], Figure]] = {
    "ablation_map": partial(drawn.ablation_map, test_experts.TestAblation.FOUND),
    "attention_maps": partial(drawn.attention_maps, BLACK_PICTURE, random_maps(2, 2, 16), 5),
    "attention_rollout": partial(drawn.attention_rollout, BLACK_PICTURE, random_rows(1, 16)[0]),
    "caption_sheet": partial(drawn.caption_sheet, PICTURES[:2], ["a", "b"], ["c", "d"], [True, False]),
    "class_maps": partial(drawn.class_maps, BLACK_PICTURE, ["a", "b"], random_rows(2, 16)),
    "coactivation_map": partial(drawn.coactivation_map, blocks()),
    "confusion_matrix": partial(drawn.confusion_matrix, confusions(10), [f"class {n}" for n in range(10)]),
    "costs_by_part": partial(drawn.costs_by_part, COSTS),
    "embedding_map": partial(drawn.embedding_map, *clusters(10)),
    "favourite_patches": partial(drawn.favourite_patches, PICTURES, block(), 4, 5),
    "load_over_time": partial(drawn.load_over_time, [{"epoch": 1.0, **routing_metrics(blocks())}]),
    "per_class": partial(drawn.per_class, [0.5, 0.9], [0.7, 0.8], ["a", "b"]),
    "prediction_grid": partial(drawn.prediction_grid, PICTURES[:4], LABELS[:4], LOGITS[:4].softmax(1), list("abcd")),
    "ranked_texts": partial(drawn.ranked_texts, BLACK_PICTURE, ["a", "b"], torch.tensor([0.1, 0.2])),
    "reliability_diagram": partial(drawn.reliability_diagram, Predictions(LOGITS, LABELS)),
    "retrieval_grid": partial(drawn.retrieval_grid, "a", PICTURES[:2], torch.tensor([0.1, 0.2]), torch.tensor([1, 0])),
    "router_confidence": partial(drawn.router_confidence, blocks()),
    "routing_map": partial(drawn.routing_map, BLACK_PICTURE, [block(num=1)], 0),
    "specialization": partial(drawn.specialization, test_experts.TestSpecialization.COUNTS, list("abc")),
    "throughput": partial(drawn.throughput, SPEEDS),
    "training_curves": partial(drawn.training_curves, history(3)),
    "utilization": partial(drawn.utilization, blocks()),
    "word_maps": partial(drawn.word_maps, BLACK_PICTURE, ["a", "b"], random_rows(2, 16)),
}


def pixels(draw: Callable[[], Figure], shown: Theme) -> np.ndarray:
    """The figure in a theme, (height, width, 3) from 0 to 1."""
    with shown_in(shown):
        canvas = FigureCanvasAgg(draw())
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def test_every_figure_is_here() -> None:
    assert FIGURES.keys() == set(drawn.__all__) - {"save", "speaking"}


@pytest.mark.parametrize("name", FIGURES)
def test_in_the_dark_no_figure_is_a_white_card(name: str) -> None:
    """Of dark pictures and of data, that is: white are some numbers, no more; and the rest is the ground."""
    found = pixels(FIGURES[name], DARK)
    assert (found.min(-1) > 0.85).mean() < 0.05
    assert np.abs(found[0, 0] - to_rgb(DARK.ground)).max() < 0.01
    assert np.abs(found[-1, -1] - to_rgb(DARK.ground)).max() < 0.01
    assert (pixels(FIGURES[name], LIGHT)[0, 0] == 1).all()


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("shown", THEMES.values(), ids=THEMES)
def test_what_is_written_can_be_read(name: str, shown: Theme) -> None:
    """On the ground, or on a colour in the better one of black and white; WCAG 2.1 asks 3 of large text, 4.5 of any."""
    with shown_in(shown):
        figure = FIGURES[name]()
        FigureCanvasAgg(figure).draw()
    on_ground = {shown.ink, shown.muted, shown.right, shown.wrong}
    for text in figure.findobj(Text):  # pyright: ignore[reportArgumentType]
        color = text.get_color()  # pyright: ignore[reportAttributeAccessIssue]
        is_known = any(same_color(color, known) for known in (*on_ground, ink_on("white"), ink_on("black")))
        assert is_known, text
    for color in on_ground:
        assert contrast(to_rgb(color), to_rgb(shown.ground)) > 3.8


@pytest.mark.parametrize("place", np.linspace(0, 1, 21))
def test_black_or_white_is_read_on_every_colour_of_a_heat_map(place: float) -> None:
    for shown in THEMES.values():
        for colors in (shown.shares, shown.changes):
            cell = colors(float(place))[:3]
            assert contrast(to_rgb(ink_on(cell)), cell) > 3.9


@pytest.mark.parametrize("shown", THEMES.values(), ids=THEMES)
def test_heat_maps_begin_at_the_ground(shown: Theme) -> None:
    for nothing in (shown.shares(0.0), shown.changes(0.5)):
        assert contrast(nothing[:3], to_rgb(shown.ground)) < 1.15
    distances = [contrast(shown.shares(place)[:3], to_rgb(shown.ground)) for place in np.linspace(0, 1, 11)]
    assert (np.diff(distances) > 0).all()


def test_experts_have_the_same_colours_in_the_dark() -> None:
    routing = block(num=1)
    picture = torch.randint(256, (3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    light = routing_picture(picture, routing)
    with shown_in(DARK):
        assert np.array_equal(routing_picture(picture, routing), light)
        dark = drawn.routing_map(picture, [routing]).legends[0].get_patches()
    legend = drawn.routing_map(picture, [routing]).legends[0].get_patches()
    assert [handle.get_facecolor() for handle in dark] == [handle.get_facecolor() for handle in legend]


def test_a_colour_over_the_ground_is_opaque() -> None:
    assert LIGHT.over_ground("#000000", 0.2) == "#cccccc"
    assert DARK.over_ground("#D55E00", 1) == "#d55e00"


def test_the_theme_is_that_of_the_innermost_block() -> None:
    assert theme() is LIGHT
    with shown_in(DARK):
        with shown_in(LIGHT):
            assert theme() is LIGHT
        assert theme() is DARK
    assert theme() is LIGHT
