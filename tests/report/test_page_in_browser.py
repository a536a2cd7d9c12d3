"""The report in a real browser: on a phone, in the dark, in Chinese, and from nothing but its own file."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("playwright", reason="playwright is not there: pip install playwright")

from matplotlib.colors import to_rgb
from PIL import Image
from playwright.sync_api import BrowserContext, Page

from diffmoe.cli import main
from diffmoe.model.heads import ImageClassifier
from diffmoe.storage.model_files import load_model_file, save_model
from diffmoe.visualization.colors import DARK

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 844}
GROUND = [round(255 * channel) for channel in to_rgb(DARK.ground)]


def report(checkpoint: Path, folder: Path, *flags: str) -> Path:
    """The report of a model of digits, made by the command."""
    where = ["--checkpoint", str(checkpoint), "--output_dir", str(folder), "--device", "cpu"]
    assert main(["visualize", *where, *flags]) == 0
    (found,) = folder.rglob("report.html")
    return found


@pytest.fixture(scope="module")
def english(trained: Any, tmp_path_factory: pytest.TempPathFactory, isolate: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with isolate(folder / "cache"):
        return report(trained.model, folder / "made")


@pytest.fixture(scope="module")
def chinese(
    trained: Any, tmp_path_factory: pytest.TempPathFactory, isolate: Callable[[Path], AbstractContextManager[None]]
) -> Path:
    """Of a dense model of random weights: a short one."""
    folder = tmp_path_factory.mktemp("chinese")
    loaded = load_model_file(trained.model)
    with isolate(folder / "cache"):
        torch.manual_seed(0)
        dense = ImageClassifier(
            replace(loaded.model.config, dense=True),
            *(loaded.model.get_buffer(name) for name in ("class_tokens", "class_mask")),
        )
        save_model(folder / "digits_model.pth", dense, loaded.data)
        return report(folder / "digits_model.pth", folder / "made", "--lang", "zh")


def opened(browser: Callable[..., BrowserContext], path: Path, **options: Any) -> tuple[Page, list[str]]:
    """The report, loaded, on a phone unless `options` say otherwise, and all addresses that it asked for."""
    context = browser(**PHONE | options)
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(path.as_uri(), wait_until="load")
    return page, asked


def background(page: Page) -> int:
    """How bright the page is, from 0 to 765."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    if color == "rgba(0, 0, 0, 0)":
        color = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3]))


def test_it_fits_a_phone_shows_every_figure_and_asks_nobody(browser: Callable[..., Any], english: Path) -> None:
    page, asked = opened(browser, english)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    sizes = page.evaluate(
        """() => Promise.all([...document.images].map(
            image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])))"""
    )
    assert len(sizes) >= 10
    assert all(width > 0 and height > 0 for width, height in sizes)
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {english.as_uri()}


def test_the_dark_is_dark(browser: Callable[..., Any], english: Path) -> None:
    brightness = {scheme: background(opened(browser, english, color_scheme=scheme)[0]) for scheme in ("light", "dark")}
    assert brightness["light"] > 600
    assert brightness["dark"] < 165


def test_chinese_is_chinese(browser: Callable[..., Any], chinese: Path) -> None:
    page, asked = opened(browser, chinese)
    assert page.locator("html").get_attribute("lang") in ("zh", "zh-CN", "zh-Hans")
    for heading in page.locator("h2").all_inner_texts():
        assert re.search("[\u4e00-\u9fff]", heading), heading
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {chinese.as_uri()}


@pytest.mark.parametrize("width", [PHONE["width"], 1280])
def test_what_is_written_in_figures_is_never_too_small_to_read(
    browser: Callable[..., Any], english: Path, width: int
) -> None:
    """A figure is at most a third smaller than drawn; where that is wider than the page, its card is scrolled."""
    page, _ = opened(browser, english, width=width)
    cards = page.evaluate(
        """() => [...document.querySelectorAll('.card')].map(card => {
            const image = card.querySelector('img');
            return [image.width / image.getAttribute('width'), image.width, card.clientWidth, card.scrollWidth];
        })"""
    )
    for scale, shown, card, scrolled in cards:
        assert 0.69 < scale <= 1
        assert scrolled >= shown
        assert card <= width
    assert any(scrolled > card for _, _, card, scrolled in cards) is (width == PHONE["width"])
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_column_of_scores_is_not_cut_on_a_phone(browser: Callable[..., Any], english: Path) -> None:
    page, _ = opened(browser, english)
    rows = page.locator("#s1 td").evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect().right)")
    assert len(rows) == 5
    assert max(rows) <= PHONE["width"]
    scrolled = page.locator("#s1 .scroll").evaluate("box => box.scrollWidth - box.clientWidth")
    assert scrolled <= 0


def test_in_the_dark_figures_are_no_white_cards(browser: Callable[..., Any], english: Path) -> None:
    """At all their edges they have the ground of the dark; on paper they are those of the light."""
    page, _ = opened(browser, english, color_scheme="dark")
    for image in page.locator(".card img").all()[:4]:
        shot = Image.open(io.BytesIO(image.screenshot())).convert("RGB")
        for corner in ((1, 1), (1, shot.height - 2)):
            assert max(abs(a - b) for a, b in zip(shot.getpixel(corner), GROUND, strict=True)) < 6  # pyright: ignore
    dark = page.locator(".card img").evaluate_all("images => images.map(image => image.currentSrc)")
    page.emulate_media(color_scheme="light")
    light = page.locator(".card img").evaluate_all("images => images.map(image => image.currentSrc)")
    assert not set(dark) & set(light)
    page.emulate_media(color_scheme="dark", media="print")
    assert page.locator(".card img").evaluate_all("images => images.map(image => image.currentSrc)") == light
