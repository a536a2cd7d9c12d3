"""The report in a real browser: on a phone, in the dark, in Chinese, and from nothing but its own file."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("playwright", reason="playwright is not there: pip install playwright")

from playwright.sync_api import BrowserContext, Page

from diffmoe.cli import main
from diffmoe.model.heads import ImageClassifier
from diffmoe.storage.model_files import load_model_file, save_model

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 844}


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
    """The report, loaded, and all addresses that it asked for."""
    context = browser(**PHONE, **options)
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
