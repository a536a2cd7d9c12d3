"""The page in a real browser: a picture in, predictions and maps out; bad uploads are a sentence, and it lives on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright", reason="playwright is not there: pip install playwright")

from matplotlib.colors import to_hex
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, Position, expect

from diffmoe.app.answers import Answers
from diffmoe.visualization.colors import DARK

pytestmark = pytest.mark.browser

SECONDS = 30_000  # of patience, in ms: the machine may be busy


@pytest.fixture
def page(browser: Callable[..., BrowserContext], served: str) -> Iterator[Page]:
    """The page, just opened; at the end all that it asked for must have been of this machine."""
    context = browser(width=1280, height=860)
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.goto(served)
    expect(page.locator("#about li").first).to_be_visible(timeout=SECONDS)
    yield page
    context.close()
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}


def choose(page: Page, name: str) -> None:
    """Another model, from the list."""
    page.locator("#model input").click()
    page.get_by_role("option", name=name).click()


def upload(page: Page, path: Path | str) -> None:
    if (remove := page.locator("#picture .top-panel button").last).is_visible():
        remove.click()
    page.locator("#picture input[type=file]").set_input_files(path)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def changed(picture: Locator, before: str | None) -> str:
    """The address of a picture, once it is another than `before`."""
    expect(picture).to_be_visible(timeout=SECONDS)
    if before:
        expect(picture).not_to_have_attribute("src", before, timeout=SECONDS)
    source = picture.get_attribute("src")
    assert source
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    return source


def test_a_picture_from_upload_to_maps(page: Page, picture: str, answers: Answers) -> None:
    choose(page, "classifier.pth")
    expect(page.locator("#about")).to_contain_text("3 classes", timeout=SECONDS)
    upload(page, picture)
    wanted = answers.predict(picture, "classifier.pth")
    best = max(wanted, key=lambda name: wanted[name])
    expect(page.locator("#classes h2")).to_have_text(re.compile(rf"\s*{best}\s*"), timeout=SECONDS)
    for name, probability in wanted.items():
        expect(page.locator("#classes")).to_contain_text(re.compile(rf"{name}\s*{probability:.0%}"))

    tab(page, "Experts")
    all_blocks = changed(page.locator("#routing img"), None)
    page.locator("#block input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#block input[type=number]")).to_have_value("1")
    changed(page.locator("#routing img"), all_blocks)

    tab(page, "Attention")
    mean = changed(page.locator("#attention img"), None)
    page.locator("#seen img").click(position=middle_of(page.locator("#seen img"), row=1, column=2))
    expect(page.locator("#patch input[type=number]")).to_have_value("7")  # the 2nd row's 3rd of 4
    changed(page.locator("#attention img"), mean)


def middle_of(picture: Locator, row: int, column: int, grid: int = 4) -> Position:
    """Where on a picture, drawn as a square in the middle of its box, a patch is."""
    box = picture.bounding_box()
    assert box
    side = min(box["width"], box["height"])
    left, top = (box["width"] - side) / 2, (box["height"] - side) / 2
    return {"x": left + (column + 0.5) * side / grid, "y": top + (row + 0.5) * side / grid}


def test_what_is_no_picture_is_a_sentence_and_the_next_is_answered(page: Page, picture: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    upload(page, tmp_path / "text.png")
    expect(page.get_by_text("text.png is not a picture: it must be a JPEG").first).to_be_visible(timeout=SECONDS)
    Image.new("L", (10000, 5000)).save(tmp_path / "many.png")
    upload(page, tmp_path / "many.png")
    expect(page.get_by_text("many.png has too many pixels").first).to_be_visible(timeout=SECONDS)
    upload(page, picture)
    choose(page, "classifier.pth")
    expect(page.locator("#classes h2")).to_have_text(re.compile(r"\s*(cat|dog|cow)\s*"), timeout=SECONDS)


def test_the_language_changes_on_the_page(page: Page, tmp_path: Path) -> None:
    tab(page, "Search")
    page.locator("#query textarea, #query input").first.fill("a cat")
    page.get_by_text("中文").click()
    expect(page.get_by_role("tab", name="注意力")).to_be_visible(timeout=SECONDS)
    for name, words in (
        ("#picture", "图片"),
        ("#search", "检索"),
        ("#about", "参数量"),
        ("#query", "留空则"),
    ):
        expect(page.locator(name)).to_contain_text(words, timeout=SECONDS)
    page.get_by_text("English").click()
    expect(page.get_by_role("tab", name="Attention")).to_be_visible(timeout=SECONDS)
    page.get_by_text("中文").click()
    expect(page.get_by_role("tab", name="注意力")).to_be_visible(timeout=SECONDS)
    (tmp_path / "text.png").write_text("no picture")
    upload(page, tmp_path / "text.png")
    # Said twice where the new language is still being shown: that looks at the picture too.
    expect(page.get_by_text("text.png 不是图片").first).to_be_visible(timeout=SECONDS)


def test_models_of_other_kinds_and_searching(page: Page, picture: str, answers: Answers) -> None:
    upload(page, picture)
    choose(page, "captioner.pth")
    caption = answers.caption(picture, "captioner.pth")
    expect(page.locator("#caption textarea")).to_have_value(caption, timeout=SECONDS)
    choose(page, "dense.pth")
    expect(page.locator("#about")).to_contain_text("dense, no experts", timeout=SECONDS)
    tab(page, "Experts")
    expect(page.locator("#dense")).to_contain_text("This model is dense", timeout=SECONDS)
    expect(page.locator("#block")).to_be_hidden()
    tab(page, "Search")
    page.locator("#query textarea, #query input").first.fill("a cat")
    page.locator("#search").click()
    best = answers.retrieve("a cat", None, ".", "dense.pth")[0][1]
    expect(page.locator("#found").get_by_text(" ".join(best.split())).first).to_be_visible(timeout=SECONDS)


def test_on_a_phone_the_title_is_in_words_and_figures_can_be_read(
    browser: Callable[..., BrowserContext], served: str, picture: str
) -> None:
    context = browser(width=390, height=844)
    page = context.new_page()
    page.goto(served)
    expect(page.locator("#about li").first).to_be_visible(timeout=SECONDS)
    title = page.locator("#title h2").bounding_box()
    assert title
    assert title["height"] < 80  # two lines of it
    choose(page, "classifier.pth")
    upload(page, picture)
    image = page.locator("#routing img")
    changed(image, None)
    shown, own = image.evaluate("image => [image.getBoundingClientRect().width, image.naturalWidth * 96 / 130]")
    assert 0.69 < shown / own <= 1
    scrolled, room = page.locator("#routing .image-container").evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert scrolled + 1 > shown > room
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_in_the_dark_figures_are_dark(browser: Callable[..., BrowserContext], served: str, picture: str) -> None:
    """When a picture comes, when a slider is moved and when a patch is clicked on."""
    context = browser(width=1280, height=860, color_scheme="dark")
    page = context.new_page()
    page.goto(served)
    expect(page.locator("#about li").first).to_be_visible(timeout=SECONDS)
    choose(page, "classifier.pth")
    expect(page.locator("#about")).to_contain_text("3 classes", timeout=SECONDS)
    upload(page, picture)
    routing, attention = page.locator("#routing img"), page.locator("#attention img")
    before = changed(routing, None)
    assert corner(routing) == to_hex(DARK.ground)
    page.locator("#block input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    changed(routing, before)
    assert corner(routing) == to_hex(DARK.ground)
    tab(page, "Attention")
    before = changed(attention, None)
    assert corner(attention) == to_hex(DARK.ground)
    page.locator("#seen img").click(position=middle_of(page.locator("#seen img"), row=1, column=2))
    changed(attention, before)
    assert corner(attention) == to_hex(DARK.ground)
    context.close()


def corner(picture: Locator) -> str:
    """The colour of a picture's first dot."""
    red, green, blue = picture.evaluate(
        """async image => {
            await image.decode();
            const canvas = new OffscreenCanvas(1, 1).getContext('2d');
            canvas.drawImage(image, 0, 0);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }"""
    )
    return f"#{red:02x}{green:02x}{blue:02x}"
