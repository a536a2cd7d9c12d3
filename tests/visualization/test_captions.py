"""What is written beside pictures are the texts, each beside its own picture, and all of it can be read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from tests.visualization.readable import assert_apart

from diffmoe.visualization import caption_sheet, ranked_texts, retrieval_grid, speaking, style
from diffmoe.visualization.colors import LIGHT
from diffmoe.visualization.language import Language

TEXTS = (
    "A black dog and a spotted dog are fighting .",
    "",
    "wolf " * 2000,
    "W" * 10_000,
    "ÀÉÎÕÜ ÇQJ " * 12,
    "a girl (in a pink dress) goes up a set of stairs in an entry way, into a wooden cabin & back again",
    "$x^2$ \\oops\n\ttwo lines",
)


def pictures(count: int, channels: int = 3, height: int = 4, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def assert_readable(figure: Figure, dpi: int = 100) -> None:
    """No text overlaps another one or a picture, or leaves the figure."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert_apart(canvas, texts, [axes for axes in figure.axes if axes.images])


def written(axes: Axes) -> list[str]:
    return [" ".join(text.get_text().split()) for text in axes.texts]


def assert_shows(axes: Axes, image: torch.Tensor) -> None:
    drawn = np.atleast_3d(np.asarray(axes.images[0].get_array()))
    assert (drawn == image.permute(1, 2, 0).numpy()).all()


class TestWrap:
    @settings(deadline=None, max_examples=40)
    @given(
        text=st.text(st.sampled_from("abc WMil.é ,"), max_size=80),
        width=st.floats(0.3, 4),
        size=st.sampled_from([style.SMALL, style.FONT_SIZE]),
    )
    def test_keeps_every_letter_in_its_order_in_lines_that_fit(self, text: str, width: float, size: float) -> None:
        lines = style.wrap(text, width, size, max_lines=200).split("\n")
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(line == line.strip() for line in lines)
        assert all(style.inches(line, size) <= width for line in lines)

    def test_breaks_between_words_and_as_late_as_it_can(self) -> None:
        words = TEXTS[5].split()
        width = 2.1
        lines = style.wrap(TEXTS[5], width, style.SMALL).split("\n")
        assert len(lines) > 1
        assert [word for line in lines for word in line.split()] == words
        for line, following in pairwise(lines):
            assert style.inches(f"{line} {following.split()[0]}", style.SMALL) > width

    @pytest.mark.parametrize("text", [TEXTS[2], TEXTS[3], "x " + "W" * 500])
    def test_what_does_not_fit_ends_in_dots(self, text: str) -> None:
        lines = style.wrap(text, 1.5, style.SMALL, max_lines=3).split("\n")
        assert len(lines) == 3
        assert lines[-1].endswith("…")
        assert text.replace(" ", "").startswith("".join(lines)[:-1].replace(" ", ""))
        assert all(style.inches(line, style.SMALL) <= 1.5 for line in lines)

    def test_a_text_of_just_max_lines_is_whole(self) -> None:
        assert style.wrap("W" * 3, style.inches("W", 8) * 1.5, 8, max_lines=3) == "W\nW\nW"

    @pytest.mark.parametrize("dpi", [72, 100, 150])
    @pytest.mark.parametrize("text", ["a girl in a pink dress goes into a cabin", "WMWMWM", "illicit till", "ÀÉÎÕÜ"])
    def test_nothing_is_drawn_wider_than_it_was_measured(self, text: str, dpi: int) -> None:
        with style.styled():
            figure = Figure(dpi=dpi)
            drawn = figure.text(0, 0, text, fontsize=style.SMALL)
            extent = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer())
            exact = style.inches(text, style.SMALL)
        assert 0.85 * exact < extent.width / dpi <= exact


@pytest.mark.usefixtures("only_base_font")
class TestDrawable:
    def test_a_letter_without_a_font_is_a_question_mark_and_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            assert style.drawable("a\n 猫  and\ta 🦮\x1b.") == "a ? and a ??."
            assert style.drawable("狗") == "?"
        assert len(caplog.records) == 1
        assert "Noto Sans CJK" in caplog.text

    def test_what_a_font_has_stays(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            assert style.drawable("Ünïcode — “ок” ✓ $5") == "Ünïcode — “ок” ✓ $5"
        assert not caplog.records

    def test_no_figure_shows_a_box(self) -> None:
        """A missing glyph is a warning of matplotlib's, and so an error here."""
        texts = ["一只猫 🐕‍🦺", "\x00\x1b control"]
        for figure in (
            caption_sheet(pictures(2), texts, texts),
            retrieval_grid(texts[0], pictures(2), torch.tensor([0.2, 0.1])),
            ranked_texts(pictures(1)[0], texts, torch.tensor([0.2, 0.1])),
        ):
            assert_readable(figure)


class TestCaptionSheet:
    @pytest.mark.parametrize(("count", "channels"), [(1, 1), (4, 3), (7, 3)])
    def test_each_picture_has_its_texts(self, count: int, channels: int) -> None:
        images = pictures(count, channels)
        captions = [f"our caption of the picture with the number {n}" for n in range(count)]
        references = [f"what a person wrote about the picture with the number {n}" for n in range(count)]
        figure = caption_sheet(images, captions, references)
        assert len(figure.axes) == count
        for axes, image, *texts in zip(figure.axes, images, captions, references, strict=True):
            assert_shows(axes, image)
            assert written(axes) == texts
            assert [text.get_color() for text in axes.texts] == [LIGHT.ink, LIGHT.muted]

    def test_new_pairs_are_marked_in_both_languages(self) -> None:
        marks: dict[Language, str] = {"en": "new pair", "zh": "新组合"}
        for language, mark in marks.items():
            with speaking(language):
                figure = caption_sheet(pictures(3), ["a", "b", "c"], ["d", "e", "f"], [False, True, False])
            if mark == "new pair" or len(style.font_families()) > 1:
                assert [written(axes) for axes in figure.axes] == [["a", "d"], ["b", "e", mark], ["c", "f"]]
            assert_readable(figure)
        with pytest.raises(ValueError, match="1 marks for 2 pictures"):
            caption_sheet(pictures(2), ["a", "b"], new=[True])

    def test_without_references(self) -> None:
        figure = caption_sheet(pictures(2), ["first", "second"])
        assert [written(axes) for axes in figure.axes] == [["first"], ["second"]]

    @pytest.mark.parametrize("dpi", [72, 150])
    def test_readable(self, dpi: int) -> None:
        assert_readable(caption_sheet(pictures(len(TEXTS)), TEXTS, TEXTS[::-1]), dpi)

    def test_our_caption_is_under_the_picture_and_the_human_one_under_ours(self) -> None:
        figure = caption_sheet(pictures(5, height=6, width=3), TEXTS[:5], ["human"] * 5)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axes in figure.axes:
            picture = axes.get_window_extent()
            own, human = (text.get_window_extent(canvas.get_renderer()) for text in axes.texts)
            assert picture.y0 > own.y1 - 1
            assert own.y0 > human.y1 - 1
            assert abs(own.x0 - picture.x0) < 3
            assert max(own.x1, human.x1) < picture.x1 + 1
            assert picture.height / picture.width == pytest.approx(2)

    @pytest.mark.parametrize(
        ("captions", "references", "says"),
        [(["a"], None, "1 captions for 2 pictures"), (["a", "b"], ["c"], "1 captions for 2 pictures")],
    )
    def test_another_number_of_texts(
        self, captions: Sequence[str], references: Sequence[str] | None, says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            caption_sheet(pictures(2), captions, references)

    def test_no_pictures(self) -> None:
        with pytest.raises(ValueError, match="no pictures"):
            caption_sheet(pictures(0), [])


class TestRetrievalGrid:
    @pytest.mark.parametrize("count", [1, 5, 7])
    def test_best_first_with_similarity_and_mark(self, count: int) -> None:
        images = pictures(count)
        scores = torch.randperm(count, generator=torch.Generator().manual_seed(0)) / 10 - 0.2
        right = torch.arange(count) == count // 2
        figure = retrieval_grid("two dogs", images, scores, right)
        assert [text.get_text() for text in figure.texts] == ["two dogs"]
        assert len(figure.axes) == count
        order = sorted(range(count), key=lambda row: -scores[row])
        for axes, row in zip(figure.axes, order, strict=True):
            assert_shows(axes, images[row])
            is_right = row == count // 2
            assert written(axes) == [f"{'✓ ' if is_right else ''}{scores[row].item():.3f}"]
            assert axes.spines["left"].get_visible() == is_right
            if is_right:
                assert axes.spines["left"].get_edgecolor()[:3] == to_rgb(LIGHT.right)
        assert_readable(figure)

    def test_without_a_right_one_nothing_is_marked(self) -> None:
        figure = retrieval_grid("two dogs", pictures(3), torch.tensor([0.1, 0.3, 0.2]))
        assert [written(axes) for axes in figure.axes] == [["0.300"], ["0.200"], ["0.100"]]

    def test_the_first_of_equals_stays_first(self) -> None:
        images = pictures(4)
        figure = retrieval_grid("q", images, torch.full((4,), 0.5))
        for axes, image in zip(figure.axes, images, strict=True):
            assert_shows(axes, image)

    @pytest.mark.parametrize("query", TEXTS)
    def test_readable(self, query: str) -> None:
        assert_readable(retrieval_grid(query, pictures(2), torch.tensor([0.2, -0.1]), torch.tensor([False, True])))

    def test_another_number_of_scores(self) -> None:
        with pytest.raises(ValueError, match="3 scores for 2 pictures"):
            retrieval_grid("q", pictures(2), torch.ones(3))


class TestRankedTexts:
    def test_bars_are_the_scores_beside_their_texts_best_on_top(self) -> None:
        texts, scores = ["a cat", "a dog", "a wolf", "a fox"], torch.tensor([0.1, 0.4, -0.25, 0.4])
        image = pictures(1)[0]
        shown, axes = ranked_texts(image, texts, scores).axes
        assert_shows(shown, image)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a dog", "a fox", "a cat", "a wolf"]
        bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        np.testing.assert_allclose([bar.get_width() for bar in bars], [0.4, 0.4, 0.1, -0.25])
        np.testing.assert_allclose([bar.get_y() + bar.get_height() / 2 for bar in bars], axes.get_yticks())
        assert written(axes) == ["0.400", "0.400", "0.100", "-0.250"]
        heights = axes.transData.transform([(0, y) for y in axes.get_yticks()])[:, 1]
        assert (np.diff(heights) < 0).all()
        assert axes.get_xlim() == pytest.approx((-0.25, 0.4))
        assert axes.get_title(loc="left") == "similarity"

    def test_probabilities_are_shares_of_the_whole_length(self) -> None:
        figure = ranked_texts(pictures(1)[0], ["cat", "dog"], torch.tensor([0.125, 0.875]), probabilities=True)
        axes = figure.axes[1]
        assert axes.get_xlim() == (0, 1)
        assert written(axes) == ["87.5%", "12.5%"]
        assert axes.get_title(loc="left") == "probability"

    @pytest.mark.parametrize("dpi", [72, 150])
    @pytest.mark.parametrize("texts", [TEXTS, ("a",), ("word",) * 40])
    def test_readable(self, texts: Sequence[str], dpi: int) -> None:
        assert_readable(ranked_texts(pictures(1)[0], texts, torch.linspace(1, 0, len(texts)), True), dpi)

    @pytest.mark.parametrize(("texts", "count"), [((), 0), (("a",), 2)])
    def test_another_number_of_scores(self, texts: Sequence[str], count: int) -> None:
        with pytest.raises(ValueError, match=f"{count} scores for {len(texts)} texts"):
            ranked_texts(pictures(1)[0], texts, torch.ones(count))
