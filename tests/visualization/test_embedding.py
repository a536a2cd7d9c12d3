"""Every point is drawn where it is, as its class; every class has its name, and no name lies on another."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from diffmoe.evaluation.embedding import FEWEST_FOR_TSNE
from diffmoe.visualization import style
from diffmoe.visualization.embedding import COLORS, MOST_NAMES, _places, class_style, embedding_map
from diffmoe.visualization.language import speaking
from diffmoe.visualization.style import LINE


def clusters(count: int, per_cluster: int = 8, spread: float = 0.1) -> tuple[Tensor, Tensor, list[str]]:
    """Classes far from each other on a circle, in which the points of a class stand around its centre."""
    labels = torch.arange(count).repeat(per_cluster)
    angle = labels * 2 * torch.pi / count
    generator = torch.Generator().manual_seed(count)
    points = 10 * torch.stack([angle.cos(), angle.sin()], 1)
    points = points + spread * torch.randn(len(labels), 2, generator=generator)
    return points, labels, [f"name {number}" for number in range(count)]


def scattered(axes: Axes) -> dict[str, np.ndarray]:
    """The points drawn, by class."""
    groups = [group for group in axes.collections if isinstance(group, PathCollection)]
    return {str(group.get_gid()): np.asarray(group.get_offsets()) for group in groups}


def names(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def assert_readable(figure: Figure, dpi: int = 100) -> None:
    """No name overlaps another one, and all of them are within the axes; the note below is within the figure."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    frame = axes.get_window_extent().extents
    boxes = []
    for text in axes.texts:
        box = text.get_bbox_patch()
        assert box is not None
        boxes.append(box.get_window_extent(canvas.get_renderer()).extents)
    x0, y0, x1, y1 = np.array(boxes).T
    assert min(*x0 - frame[0], *y0 - frame[1], *frame[2] - x1, *frame[3] - y1) > -1
    shared_width = np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0)
    shared_height = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0)
    overlaps = np.triu((shared_width > 1) & (shared_height > 1), k=1)
    assert not overlaps.any(), [(names(figure)[i], names(figure)[j]) for i, j in np.argwhere(overlaps)]
    (note,) = figure.texts
    below = note.get_window_extent(canvas.get_renderer()).extents
    assert min(below[0], below[1], canvas.get_width_height()[0] - below[2], frame[1] - below[3]) > 0


@pytest.mark.parametrize("count", [1, 3, 10, 30])
def test_every_point_is_drawn_in_its_class_at_one_scale(count: int) -> None:
    points, labels, class_names = clusters(count)
    figure = embedding_map(points, labels, class_names)
    drawn = scattered(figure.axes[0])
    assert list(drawn) == [f"class {number}" for number in range(count)]
    places = np.zeros((len(points), 2))
    for number in range(count):
        places[(labels == number).numpy()] = drawn[f"class {number}"]
    # One scale for both axes, and up is up: only a shift is left when it is divided out.
    scale = np.ptp(places, axis=0).max() / np.ptp(points.numpy(), axis=0).max()
    shift = places - scale * points.numpy()
    np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-5)
    width, height = figure.axes[0].get_window_extent().size
    limits = (*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim())
    assert width == pytest.approx(height)
    assert limits[:2] == limits[2:]
    assert (places > limits[0]).all()
    assert (places < limits[1]).all()


def test_a_class_that_lies_apart_has_its_name_at_its_median() -> None:
    points, labels, class_names = clusters(5, per_cluster=9)
    (axes,) = embedding_map(points, labels, class_names).axes
    assert [text.get_text() for text in axes.texts] == class_names
    for text, places in zip(axes.texts, scattered(axes).values(), strict=True):
        assert text.get_position() == pytest.approx(tuple(np.median(places, axis=0)))
    assert not axes.lines


def test_a_name_that_had_to_move_points_at_its_median() -> None:
    points, labels = torch.zeros(30, 2), torch.arange(30) % 3
    points[29] = torch.tensor([1.0, 1.0])
    (axes,) = embedding_map(points, labels, ["a", "b", "c"]).axes
    first, *moved = axes.texts
    median = np.median(scattered(axes)["class 0"], axis=0)
    assert first.get_position() == pytest.approx(tuple(median))
    ends = {tuple(np.round(line.get_xydata()[1], 6)) for line in axes.lines}  # pyright: ignore
    far = [text for text in moved if np.hypot(*(np.array(text.get_position()) - median)) > LINE]
    assert {tuple(np.round(text.get_position(), 6)) for text in far} == ends
    for line in axes.lines:
        assert tuple(np.asarray(line.get_xydata())[0]) == pytest.approx(tuple(median))
        assert line.get_markevery() == [0]


def test_a_class_has_one_color_for_points_and_name() -> None:
    (axes,) = embedding_map(*clusters(10)).axes
    for number, (group, text) in enumerate(zip(axes.collections, axes.texts, strict=True)):
        assert same_color(group.get_facecolor()[0][:3], class_style(number)[0])  # pyright: ignore
        box = text.get_bbox_patch()
        assert box is not None
        assert same_color(box.get_edgecolor(), class_style(number)[0])


def test_styles_are_told_apart() -> None:
    styles = [class_style(number) for number in range(100)]
    assert len(set(styles)) == 100
    assert [len(set(kinds)) for kinds in zip(*styles[:10], strict=True)] == [10, 10]
    assert len(set(COLORS)) == 10


def test_a_class_without_points_is_not_named() -> None:
    figure = embedding_map(torch.randn(8, 2), torch.tensor([0, 2] * 4), ["a", "b", "c"])
    assert names(figure) == ["a", "c"]
    assert list(scattered(figure.axes[0])) == ["class 0", "class 2"]


def test_of_too_many_classes_the_most_frequent_are_named() -> None:
    labels = torch.arange(MOST_NAMES + 5).repeat(2)[5:]  # the first five come once only
    class_names = [str(number) for number in range(MOST_NAMES + 5)]
    figure = embedding_map(torch.randn(len(labels), 2), labels, class_names)
    assert names(figure) == class_names[5:]
    assert Counter(len(group) for group in scattered(figure.axes[0]).values()) == {1: 5, 2: MOST_NAMES}


@pytest.mark.parametrize("dpi", [72, 150])
@pytest.mark.parametrize("count", [1, 10, 20, 21, 100])
def test_readable(count: int, dpi: int) -> None:
    """All classes at one place: the worst that there is."""
    points = torch.randn(4 * count, 2, generator=torch.Generator().manual_seed(0))
    class_names = [f"{'a rather long name of a class' if number % 3 else 'W' * 30} {number}" for number in range(count)]
    assert_readable(embedding_map(points, torch.arange(count).repeat(4), class_names), dpi)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), count=st.integers(1, 30))
def test_boxes_never_overlap_and_stay_in_the_square(data: st.DataObject, count: int) -> None:
    side = 6.0
    inside, sizes = st.floats(0, side), st.floats(0.1, 0.8)
    wanted = np.array(data.draw(st.lists(st.tuples(inside, inside), min_size=count, max_size=count)))
    size = np.array(data.draw(st.lists(st.tuples(sizes, sizes), min_size=count, max_size=count)))
    centers = _places(wanted, size, side)
    assert (centers - size / 2 > -1e-9).all()
    assert (centers + size / 2 < side + 1e-9).all()
    for one in range(count):
        for other in range(one):
            apart = np.abs(centers[one] - centers[other]) - (size[one] + size[other]) / 2
            assert apart.max() > -1e-9
    np.testing.assert_allclose(centers[0], np.clip(wanted[0], size[0] / 2, side - size[0] / 2))


def test_no_room_is_said() -> None:
    with pytest.raises(ValueError, match="no room for 3 names"):
        _places(np.ones((3, 2)), np.full((3, 2), 1.2), side=2.0)


@pytest.mark.parametrize(("count", "method"), [(FEWEST_FOR_TSNE, "PCA, then t-SNE"), (FEWEST_FOR_TSNE - 1, "PCA")])
def test_the_note_says_how_many_and_which_method(count: int, method: str) -> None:
    figure = embedding_map(torch.randn(count, 2), torch.zeros(count, dtype=torch.int64), ["a"])
    assert [text.get_text() for text in figure.texts] == [f"{count} pictures; {method}; the axes have no unit"]


def test_one_point() -> None:
    figure = embedding_map(torch.zeros(1, 2), torch.tensor([0]), ["a"])
    (place,) = scattered(figure.axes[0])["class 0"]
    assert place == pytest.approx([np.mean(figure.axes[0].get_xlim())] * 2)


@pytest.mark.parametrize(
    ("count", "labels", "says"),
    [(2, [0], "1 labels for 2 points"), (0, [], "0 labels for 0 points"), (2, [0, 3], "2 class names for label 3")],
)
def test_what_does_not_fit(count: int, labels: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        embedding_map(torch.zeros(count, 2), torch.tensor(labels, dtype=torch.int64), ["a", "b"])


@pytest.mark.usefixtures("only_base_font")
def test_no_name_is_a_box() -> None:
    """A missing glyph is a warning of matplotlib's, and so an error here."""
    figure = embedding_map(*clusters(2)[:2], ["猫", "dog"])
    assert_readable(figure)
    assert names(figure) == ["class 0", "dog"]


@pytest.mark.skipif(len(style.font_families()) == 1, reason="no font that has Chinese is installed")
def test_in_chinese() -> None:
    with speaking("zh"):
        figure = embedding_map(*clusters(2))
    assert "张图片" in "".join(text.get_text() for text in figure.findobj(Text))  # pyright: ignore
    assert_readable(figure)
