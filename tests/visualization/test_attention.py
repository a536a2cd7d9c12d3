"""A heat map's cells are the weights, each over its own patch and under its own name, and all of it can be read."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import NDArray
from tests.visualization.readable import assert_apart
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.model.encoders import AttentionMap
from diffmoe.visualization import style
from diffmoe.visualization.attention import MOST, attention_maps, attention_rollout, class_maps, word_maps
from diffmoe.visualization.language import speaking

WORDS = ("a", "skateboarder", "rides", "down", "the", "$5", "floccinaucinihilipilificationalist" * 3, ".")


def picture(channels: int = 1, height: int = 28, width: int = 28) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(256, (channels, height, width), generator=generator, dtype=torch.uint8)


def random_maps(num_blocks: int, num_heads: int, num_patches: int) -> list[AttentionMap]:
    generator = torch.Generator().manual_seed(num_heads)
    weights = torch.randn(num_blocks, 1, num_heads, num_patches, num_patches, generator=generator).mul(2).softmax(-1)
    return [AttentionMap(block, "image", layer) for layer, block in enumerate(weights)]


def random_rows(count: int, num_patches: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, num_patches, generator=generator).mul(2).softmax(-1)


def cells(axes: Axes) -> NDArray[np.float32]:
    """The heat map over the picture."""
    _grey, heat = axes.images
    return np.asarray(heat.get_array())


def heat_axes(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if len(axes.images) == 2]


def title(axes: Axes) -> str:
    return axes.get_title(loc="left").replace("\n", " ")


def color_bar(figure: Figure) -> Axes:
    (bar,) = [axes for axes in figure.axes if not axes.images]
    return bar


def bar_of(figure: Figure) -> Any:
    """The Colorbar itself."""
    return color_bar(figure)._colorbar  # pyright: ignore[reportAttributeAccessIssue]


def drawn_in(figure: Figure, dpi: int = 100) -> FigureCanvasAgg:
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def assert_readable(figure: Figure, dpi: int = 100) -> None:
    """No text overlaps another one or a picture, or leaves the figure."""
    canvas = drawn_in(figure, dpi)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]  # pyright: ignore
    assert_apart(canvas, texts, figure.axes)


class TestAttentionMaps:
    @pytest.mark.parametrize("patch", [None, 0, 17, 48])
    def test_cells_are_the_weights(self, patch: int | None) -> None:
        maps = random_maps(2, 3, 49)
        panels = heat_axes(attention_maps(picture(), maps, patch))
        assert len(panels) == 2 * (1 + 3)
        for block, attention in enumerate(maps):
            weights = attention.weights[0]
            heads = [head.mean(0) if patch is None else head[patch] for head in weights]
            for axes, expected in zip(panels[4 * block :], [sum(heads) / 3, *heads], strict=False):
                np.testing.assert_allclose(cells(axes), torch.as_tensor(expected).view(7, 7), atol=1e-6)

    def test_blocks_and_heads_are_named(self) -> None:
        panels = heat_axes(attention_maps(picture(), random_maps(2, 2, 49)))
        assert [title(axes) for axes in panels[:3]] == ["mean of heads", "head 1", "head 2"]
        assert [axes.get_ylabel() for axes in panels] == ["image block 1", "", "", "image block 2", "", ""]

    @pytest.mark.parametrize(("patch", "corner"), [(0, (0, 0)), (17, (12, 8)), (48, (24, 24))])
    def test_the_patch_is_framed_in_every_panel(self, patch: int, corner: tuple[int, int]) -> None:
        """17 = 2 * 7 + 3: third row, fourth column, of patches of 4 pixels."""
        figure = attention_maps(picture(), random_maps(1, 2, 49), patch)
        for axes in figure.axes[:4]:
            frames = [frame for frame in axes.patches if isinstance(frame, Rectangle)]
            assert {(*frame.get_xy(), frame.get_width(), frame.get_height()) for frame in frames} == {(*corner, 4, 4)}

    def test_without_a_patch_none_is_framed(self) -> None:
        figure = attention_maps(picture(), random_maps(1, 2, 49))
        assert not any(axes.patches for axes in figure.axes if axes.images)

    def test_only_the_image_tower_is_drawn(self) -> None:
        maps = random_maps(1, 2, 49)
        text = AttentionMap(torch.ones(1, 2, 5, 5) / 5, "text", 0)
        cross = AttentionMap(torch.ones(1, 2, 5, 49) / 49, "fusion", 0, cross=True)
        panels = heat_axes(attention_maps(picture(), [text, *maps, cross]))
        alone = heat_axes(attention_maps(picture(), maps))
        assert len(panels) == len(alone) == 3
        for axes, other in zip(panels, alone, strict=True):
            np.testing.assert_array_equal(cells(axes), cells(other))

    @pytest.mark.parametrize(
        ("channels", "size", "patches", "blocks", "heads"),
        [(1, 8, 16, 1, 4), (1, 28, 49, 6, 8), (3, 32, 64, 2, 4), (3, 64, 64, 2, 12), (3, 64, 256, 1, 1)],
    )
    def test_readable(self, channels: int, size: int, patches: int, blocks: int, heads: int) -> None:
        maps = random_maps(blocks, heads, patches)
        assert_readable(attention_maps(picture(channels, size, size), maps, patches - 1))

    def test_many_heads_make_small_pictures_not_a_wide_figure(self) -> None:
        assert attention_maps(picture(), random_maps(1, 16, 49)).get_size_inches()[0] < 13

    @pytest.mark.parametrize("patch", [-1, 49])
    def test_a_patch_that_is_not_there(self, patch: int) -> None:
        with pytest.raises(UserError, match=f"patch is {patch}: it must be 0 to 48"):
            attention_maps(picture(), random_maps(1, 1, 49), patch)

    def test_several_pictures(self) -> None:
        maps = [AttentionMap(torch.ones(2, 1, 49, 49) / 49, "image", 0)]
        with pytest.raises(ValueError, match="of 2 pictures"):
            attention_maps(picture(), maps)

    def test_maps_that_still_have_a_gradient(self) -> None:
        maps = [AttentionMap(random_maps(1, 1, 49)[0].weights.requires_grad_(), "image", 0)]
        assert heat_axes(attention_maps(picture(), maps))


class TestHeatMap:
    """What all figures here share."""

    @pytest.mark.parametrize(("channels", "height", "width", "grid"), [(1, 8, 8, (4, 4)), (3, 6, 12, (3, 6))])
    def test_lies_over_its_patches(self, channels: int, height: int, width: int, grid: tuple[int, int]) -> None:
        image, weights = picture(channels, height, width), random_rows(1, grid[0] * grid[1])[0]
        shown, (axes,) = attention_rollout(image, weights).axes[0], heat_axes(attention_rollout(image, weights))
        np.testing.assert_allclose(cells(axes), weights.view(grid))
        grey, heat = axes.images
        assert [drawn.get_extent() for drawn in (*shown.images, grey, heat)] == [[0, width, height, 0]] * 3
        assert {drawn.get_interpolation() for drawn in (*shown.images, grey, heat)} == {"nearest"}
        assert (np.atleast_3d(np.asarray(shown.images[0].get_array())) == image.permute(1, 2, 0).numpy()).all()

    def test_the_picture_under_it_is_grey_and_dimmed(self) -> None:
        image = torch.tensor([[[0, 255, 255, 0]], [[0, 255, 0, 255]], [[0, 255, 0, 0]]], dtype=torch.uint8)
        (axes,) = heat_axes(attention_rollout(image, torch.tensor([0.1, 0.2, 0.3, 0.4])))
        black, white, red, green = np.asarray(axes.images[0].get_array()).ravel()
        assert 0 < black < white < 1
        assert (red - black) / (white - black) == pytest.approx(0.299)
        assert (green - black) / (white - black) == pytest.approx(0.587)

    def test_a_higher_value_is_a_later_color_and_less_of_the_picture(self) -> None:
        weights = torch.tensor([1.0, 0.3, 0.2, 0.1])
        (axes,) = heat_axes(attention_rollout(picture(1, 2, 2), weights))
        _, heat = axes.images
        rgba = heat.to_rgba(weights.sort().values.numpy())
        assert (np.diff(rgba[:, 3]) > 0).all()
        assert (np.diff(rgba[:, :3] @ [0.2126, 0.7152, 0.0722]) > 0).all()
        assert tuple(rgba[-1, :3]) == pytest.approx(matplotlib.colormaps["viridis"](1.0)[:3])

    @pytest.mark.parametrize("sharpness", [0.1, 2.0, 9.0])
    def test_one_scale_for_all_maps_of_all_figures(self, sharpness: float) -> None:
        """Whatever they show: up to 8 times an even share of attention, 4 times one of the embedding."""
        weights = (sharpness * random_rows(3, 49).log()).softmax(-1)
        maps = [AttentionMap(weights[:1].expand(1, 2, 49, 49), "image", 0)]
        for figure, top in (
            (word_maps(picture(), ["a", "b", "c"], weights), 8 / 49),
            (attention_maps(picture(), maps, 3), 8 / 49),
            (attention_rollout(picture(), weights[0]), 4 / 49),
            (class_maps(picture(), ["a", "b", "c"], weights, "attention"), 1.0),
        ):
            for axes in heat_axes(figure):
                assert (axes.images[1].norm.vmin, axes.images[1].norm.vmax) == (0, top)
            assert color_bar(figure).get_ylim() == pytest.approx((0, top))

    def test_the_bar_points_on_where_there_may_be_more(self) -> None:
        figures = (word_maps(picture(), ["a"], random_rows(1, 49)), class_maps(picture(), ["a"], random_rows(1, 49)))
        assert [bar_of(figure).extend for figure in figures] == ["max", "neither"]

    def test_the_color_bar_shows_the_heat_over_a_middling_grey(self) -> None:
        figure = attention_rollout(picture(1, 2, 2), torch.tensor([0.4, 0.3, 0.2, 0.1]))
        (axes,) = heat_axes(figure)
        grey, heat = axes.images
        middle = float(np.mean(grey.to_rgba(np.array([0.2, 0.85]))[:, 0]))
        r, g, b, opacity = heat.to_rgba(np.array([0.4]))[0]
        expected = [opacity * channel + (1 - opacity) * middle for channel in (r, g, b)]
        (colors,) = [mesh for mesh in color_bar(figure).collections if isinstance(mesh.get_array(), np.ndarray)]
        assert tuple(colors.to_rgba(np.array([0.4]))[0][:3]) == pytest.approx(expected, abs=0.01)  # pyright: ignore

    def test_even_attention_is_not_the_brightest(self) -> None:
        """The root of 1 in 8 up the scale."""
        weights = torch.full((2, 49), 1 / 49) + torch.randn(2, 49) * 1e-9
        for axes in heat_axes(word_maps(picture(), ["a", "b"], weights)):
            heat = axes.images[1]
            assert isinstance(heat, AxesImage)
            np.testing.assert_allclose(np.asarray(heat.norm(cells(axes))), 0.3536, atol=1e-3)

    @pytest.mark.parametrize(("patches", "size"), [(50, 28), (48, 28), (12, 28), (49, 55)])
    def test_patches_that_do_not_fill_the_picture(self, patches: int, size: int) -> None:
        image = picture(1, size, 28)
        with pytest.raises(ValueError, match=f"{patches} square patches do not fill a picture of {size}x28"):
            attention_rollout(image, random_rows(1, patches)[0])


class TestWordMaps:
    @pytest.mark.parametrize("count", [1, 5, 6, 24])
    def test_each_word_has_its_own_map(self, count: int) -> None:
        words, weights = [f"word{number}" for number in range(count)], random_rows(count, 64)
        figure = word_maps(picture(3, 64, 64), words, weights)
        panels = heat_axes(figure)
        assert [title(axes) for axes in panels] == words
        assert title(figure.axes[0]) == "picture"
        for axes, row in zip(panels, weights, strict=True):
            np.testing.assert_allclose(cells(axes), row.view(8, 8))
        assert_readable(figure)

    def test_reading_order(self) -> None:
        """Left to right, then down; the picture comes first."""
        figure = word_maps(picture(), [str(number) for number in range(14)], random_rows(14, 49))
        places = [(round(-axes.get_position().y0, 3), axes.get_position().x0) for axes in figure.axes[:15]]
        assert places == sorted(places)

    def test_the_first_of_too_many(self) -> None:
        words = [str(number) for number in range(MOST + 3)]
        panels = heat_axes(word_maps(picture(), words, random_rows(MOST + 3, 49)))
        assert [title(axes) for axes in panels] == words[:MOST]

    def test_even_attention_is_named(self) -> None:
        label = color_bar(word_maps(picture(), ["a"], random_rows(1, 64))).get_ylabel()
        assert "even: 1.6%" in label

    @pytest.mark.parametrize("dpi", [72, 150])
    def test_readable(self, dpi: int) -> None:
        figure = word_maps(picture(), WORDS, random_rows(len(WORDS), 49))
        assert_readable(figure, dpi)
        *_, long, _ = heat_axes(figure)
        assert len(long.get_title(loc="left").split("\n")) == 2
        assert title(long).endswith("…")

    @pytest.mark.parametrize("words", [[], ["a"]])
    def test_another_number_of_words(self, words: list[str]) -> None:
        with pytest.raises(ValueError, match=f"2 maps for {len(words)} words"):
            word_maps(picture(), words, random_rows(2, 49))

    @pytest.mark.usefixtures("only_base_font")
    def test_no_word_is_a_box(self) -> None:
        """A missing glyph is a warning of matplotlib's, and so an error here."""
        figure = word_maps(picture(), ["猫", "🐕"], random_rows(2, 49))
        assert_readable(figure)
        assert [title(axes) for axes in heat_axes(figure)] == ["?", "?"]


class TestClassMaps:
    @pytest.mark.parametrize(("kind", "label"), [("similarity", "cosine"), ("attention", "share of the patch's")])
    def test_each_class_has_its_own_map_and_the_measure_is_named(self, kind: str, label: str) -> None:
        names, values = [f"class {number}" for number in range(10)], random_rows(49, 10).T
        figure = class_maps(picture(), names, values, kind)  # pyright: ignore[reportArgumentType]
        panels = heat_axes(figure)
        assert [title(axes) for axes in panels] == names
        for axes, row in zip(panels, values, strict=True):
            np.testing.assert_allclose(cells(axes), row.view(7, 7))
        assert label in color_bar(figure).get_ylabel().replace("\n", " ")
        assert ("even: 10.0%" in color_bar(figure).get_ylabel()) == (kind == "attention")
        assert_readable(figure)

    def test_a_cosine_may_be_negative(self) -> None:
        values = torch.linspace(-1, 1, 2 * 49).view(2, 49)
        figure = class_maps(picture(), ["a", "b"], values)
        assert color_bar(figure).get_ylim() == pytest.approx((-1, 1))
        drawn_in(figure)
        ticks = [text.get_text() for text in color_bar(figure).get_yticklabels()]
        assert "0" in ticks
        assert not any("%" in tick for tick in ticks)

    def test_similarities_may_share_a_scale(self) -> None:
        """A figure alone has its own; at least a little wide, or what is all alike would be noise."""
        values = torch.linspace(0.2, 0.3, 49)[None]
        for limits, expected in ((None, (0.2, 0.3)), ((-0.1, 0.5), (-0.1, 0.5))):
            figure = class_maps(picture(), ["a"], values, limits=limits)
            assert color_bar(figure).get_ylim() == pytest.approx(expected)
        even = class_maps(picture(), ["a"], torch.full((1, 49), 0.2))
        assert np.ptp(color_bar(even).get_ylim()) > 0.9e-3

    def test_the_largest_of_too_many_in_their_order(self) -> None:
        values = torch.zeros(30, 49)
        large = [*range(0, 10), *range(16, 30)]
        values[large] = 0.5
        figure = class_maps(picture(), [f"c{number}" for number in range(30)], values)
        assert [title(axes) for axes in heat_axes(figure)] == [f"c{number}" for number in large]

    def test_long_names(self) -> None:
        names = ["a very long class name, which goes on and on until it ends"] * 7 + ["W" * 100]
        assert_readable(class_maps(picture(3, 32, 32), names, random_rows(8, 64)))

    def test_another_number_of_names(self) -> None:
        with pytest.raises(ValueError, match="2 maps for 1 class names"):
            class_maps(picture(), ["a"], random_rows(2, 49))


@pytest.mark.skipif(len(style.font_families()) == 1, reason="no font that has Chinese is installed")
def test_all_of_it_in_chinese() -> None:
    with speaking("zh"):
        figures = [
            attention_maps(picture(), random_maps(2, 12, 49), 3),
            attention_rollout(picture(), random_rows(1, 49)[0]),
            class_maps(picture(), ["1"], random_rows(1, 49)),
            class_maps(picture(), ["1"], random_rows(1, 49), "attention"),
        ]
    for figure in figures:
        texts = [title(axes) for axes in figure.axes] + [color_bar(figure).get_ylabel()]
        assert not any(letter.isascii() and letter.isalpha() for text in texts for letter in text), texts
        assert_readable(figure)
