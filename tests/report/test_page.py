"""The page holds all that it was given, needs nothing from elsewhere, and shows texts as texts."""

from __future__ import annotations

import base64
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from diffmoe.config import UserError
from diffmoe.report.page import LARGEST_SVG, Facts, Section, data_uri, how_to_read, write_report
from diffmoe.visualization import router_confidence, specialization, style
from diffmoe.visualization.colors import DARK, LIGHT, theme
from diffmoe.visualization.language import Language, chinese, say, speaking

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "img", "input", "br", "source"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes and the text inside it; unbalanced tags are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for number in self.open:
            self.elements[number][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, "".join(text).strip()) for name, attrs, text in self.elements if name == tag]


def line(points: int = 3) -> Figure:
    figure = Figure(figsize=(4, 2))
    figure.add_subplot().plot(np.random.default_rng(0).random(points), "o", gid=EVIL)
    return figure


def page(tmp_path: Path, *sections: Section, **facts: object) -> Page:
    path = write_report(tmp_path / "report.html", EVIL, sections, "en", Facts(**facts))  # pyright: ignore[reportArgumentType]
    return Page(path.read_text(encoding="utf-8"))


def test_all_that_was_given_is_there_in_order_and_only_as_text(tmp_path: Path) -> None:
    found = page(
        tmp_path,
        Section(
            EVIL, [line], "reading <1> & so on", note=f"note {EVIL}", table=[("a", EVIL), ("<b>", 0.5), ("c", "d")]
        ),
        Section("two", [line, line], "reading 2"),
        Section("three", (), ""),
        summary=[(EVIL, EVIL)],
        notes=[EVIL],
        settings=[("embed_dim", 16), ("x", EVIL)],
        command=f"diffmoe visualize {EVIL}",
    )
    assert not found.all("script")
    assert not found.all("b")
    assert found.all("h1") == [({}, EVIL)]
    assert [text for _, text in found.all("h2")] == ["Contents", EVIL, "two", "three"]
    links = [(attrs["href"], text) for attrs, text in found.all("a") if attrs.get("class") != "top"]
    assert [text for _, text in links] == [EVIL, "two", "three"]
    assert [href for href, _ in links] == [f"#{attrs['id']}" for attrs, _ in found.all("section")]
    assert [text for attrs, text in found.all("p") if attrs["class"] == "reading"] == [
        "How to read it: reading <1> & so on",
        "How to read it: reading 2",
    ]
    assert [text for _, text in found.all("th")] == ["a", EVIL, "<b>", "c"]
    assert [text for _, text in found.all("td")] == ["0.5", "d"]
    assert [text for _, text in found.all("dt")] == [EVIL, "embed_dim", "x"]
    assert [text for _, text in found.all("dd")] == [EVIL, "16", EVIL]
    assert found.all("li")[0][1] == EVIL
    assert found.all("code")[0][1] == f"diffmoe visualize {EVIL}"
    assert [attrs["alt"] for attrs, _ in found.all("img")] == [EVIL, "two (1/2)", "two (2/2)"]
    assert [attrs["width"] for attrs, _ in found.all("img")] == ["384"] * 3


def test_nothing_is_fetched_and_the_browser_would_refuse_to(tmp_path: Path) -> None:
    found = page(tmp_path, Section("a", [line, partial(line, 5000)], "b"))
    addresses = [
        str(attrs[name]) for _, attrs, _ in found.elements for name in ("src", "href", "srcset") if name in attrs
    ]
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {name for name, _, _ in found.elements}
    css = found.all("style")[0][1]
    assert "url(" not in css
    assert "@import" not in css
    (policy,) = [attrs["content"] for attrs, _ in found.all("meta") if "http-equiv" in attrs]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_figure_is_vectors_until_that_is_large(tmp_path: Path) -> None:
    small, large = (data_uri(line(points)) for points in (3, 5000))
    svg = base64.b64decode(small.removeprefix("data:image/svg+xml;base64,"))
    png = base64.b64decode(large.removeprefix("data:image/png;base64,"))
    assert b"<svg" in svg
    assert b"<script" not in svg
    assert png.startswith(b"\x89PNG")
    assert len(svg) <= LARGEST_SVG
    assert len(png) < LARGEST_SVG


def test_the_same_figures_make_the_same_page(tmp_path: Path) -> None:
    paths = [write_report(tmp_path / name, "t", [Section("a", [line], "b")], "en") for name in ("1", "2")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_sections_may_be_made_one_by_one_and_speak_the_language_of_the_page(tmp_path: Path) -> None:
    def sections():
        yield Section("a", [line], how_to_read(confusion))
        yield Section(say("Confusion matrix"), (), "")

    @style.styled()
    def confusion() -> Figure:
        """How to read it: a row is a true class, a coloured cell off the diagonal the class that it is mistaken for."""
        return line()

    path = write_report(tmp_path / "zh.html", "t", sections(), "zh")
    found = Page(path.read_text(encoding="utf-8"))
    assert found.all("html")[0][0]["lang"] == "zh-Hans"
    assert [text for _, text in found.all("h2")] == ["目录", "a", "混淆矩阵"]
    assert any("每一行是一个真实类别" in text for _, text in found.all("p"))
    assert say("Contents") == "Contents"


@pytest.mark.usefixtures("only_base_font")
@pytest.mark.parametrize(("language", "told"), [("zh", True), ("en", False)])
def test_no_chinese_font_is_said(tmp_path: Path, language: Language, told: bool) -> None:
    path = write_report(tmp_path / "report.html", "t", [], language)
    assert ("没有安装含中文字符的字体" in path.read_text(encoding="utf-8")) is told


def test_how_to_read_is_the_whole_first_paragraph() -> None:
    for draw, explained in ((specialization, "bits"), (router_confidence, "median"), (router_confidence, "dotted")):
        assert explained in how_to_read(draw)
        assert "  " not in how_to_read(draw)
        with speaking("zh"):
            assert how_to_read(draw) in chinese().values()


def test_how_to_read_needs_its_sentence() -> None:
    def draw() -> Figure:
        """Draws something."""
        return Figure()

    with pytest.raises(ValueError, match="docstring of draw must begin with 'How to read it: '"):
        how_to_read(draw)


@pytest.mark.parametrize(
    "needed", ["prefers-color-scheme: dark", "@media print", "max-width: max(100%, .7 * var(--own)); height: auto"]
)
def test_the_page_is_for_dark_rooms_paper_and_phones(tmp_path: Path, needed: str) -> None:
    found = page(tmp_path)
    assert needed in found.all("style")[0][1]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for a, _ in found.all("meta")]


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", "t", [], "en")


def contrast(page_css: str, theme: int, ink: str, ground: str) -> float:
    """WCAG 2.1's contrast ratio of two of the page's colours; theme 0 is light, 1 dark."""

    def luminance(name: str) -> float:
        color = re.findall(rf"--{name}: #([0-9a-f]{{6}});", page_css)[theme]
        channels = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(ink), luminance(ground)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_words_can_be_read_in_both_themes(tmp_path: Path, theme: int) -> None:
    css = page(tmp_path).all("style")[0][1]
    for ink in ("ink", "muted", "link"):
        for ground in ("page", "raised"):
            assert contrast(css, theme, ink, ground) >= 4.5


def test_each_figure_is_drawn_for_the_light_and_for_the_dark(tmp_path: Path) -> None:
    drawn = []
    found = page(tmp_path, Section("a", [lambda: drawn.append(theme()) or line()], "b"))
    assert drawn == [LIGHT, DARK]
    (source,), (image,) = ([attrs for attrs, _ in found.all(tag)] for tag in ("source", "img"))
    assert source["media"] == "screen and (prefers-color-scheme: dark)"
    light, dark = (
        base64.b64decode(str(address).removeprefix("data:image/svg+xml;base64,")).decode()
        for address in (image["src"], source["srcset"])
    )
    assert DARK.ground.lower() in dark
    assert DARK.ground.lower() not in light


def test_a_figures_card_has_the_ground_of_its_figure(tmp_path: Path) -> None:
    css = page(tmp_path).all("style")[0][1]
    assert re.findall(r"--raised: (#[0-9a-f]{6});", css)[:2] == ["#ffffff", DARK.ground.lower()]
    assert to_hex(LIGHT.ground) == "#ffffff"
    assert "background: var(--raised)" in re.findall(r"\.card \{(.*?)\}", css, re.DOTALL)[0]
