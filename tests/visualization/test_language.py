"""Every text has its Chinese, no Chinese is left over, and what no font can draw is not drawn."""

from __future__ import annotations

import ast
import logging
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text

import diffmoe
from diffmoe.report.page import HOW_TO_READ, HTML_LANGUAGES
from diffmoe.tasks import TASKS
from diffmoe.visualization import confusion_matrix, language, style, training_curves
from diffmoe.visualization.language import LANGUAGES, chinese, current, say, speaking
from diffmoe.visualization.style import figure_language, styled

SOURCES = Path(diffmoe.__file__).parent
TABLES = sorted((SOURCES / "visualization" / "chinese").glob("*.yaml"))


SAID_BY_NAME = {"report/page.py": 1, "visualization/profile.py": 2}
"""Files that say what is in a variable: a figure's sentence, which `said` finds, and a part's name, which is checked
there. Elsewhere a text that is no literal would escape these tests."""


def calls_of_say(source: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and "say" in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
            yield node


def said(source: str) -> Iterator[tuple[str, set[str]]]:
    """Every text that a file says, with the values that it hands over: literals, and figures' sentences."""
    for call in calls_of_say(source):
        if isinstance(call.args[0], ast.Constant):
            yield str(call.args[0].value), {str(keyword.arg) for keyword in call.keywords}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "").startswith(HOW_TO_READ):
            first = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            yield first.removeprefix(HOW_TO_READ), set()


def texts() -> dict[str, list[tuple[str, set[str]]]]:
    """By file within the package."""
    found = {str(path.relative_to(SOURCES)): list(said(path.read_text("utf-8"))) for path in SOURCES.rglob("*.py")}
    return {file: of_file for file, of_file in found.items() if of_file}


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def entries(path: Path) -> list[tuple[str, str]]:
    """Key and value of each line, a key that comes twice too."""
    node = yaml.compose(path.read_text("utf-8"))
    return [(key.value, value.value) for key, value in node.value] if node else []


def test_the_texts_are_found() -> None:
    source = '''
def draw():
    """How to read it: left to
    right.

    More."""
    say("a {b}", b=say("c"))
    language.say("d")
    say(name)
'''
    assert sorted(said(source)) == [("a {b}", {"b"}), ("c", set()), ("d", set()), ("left to right.", set())]


def test_no_text_escapes() -> None:
    """They are literals, wherever they are said."""
    by_name = Counter(
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        for call in calls_of_say(path.read_text("utf-8"))
        if not isinstance(call.args[0], ast.Constant)
    )
    assert by_name == SAID_BY_NAME
    assert {"report", "visualization", "app", "comparison"} == {Path(file).parts[0] for file in texts()}


def test_what_the_accuracy_of_a_task_is_of_has_its_chinese() -> None:
    assert {task.curve for task in TASKS} <= chinese().keys()


def test_every_text_has_its_chinese() -> None:
    missing = {(file, text) for file, of_file in texts().items() for text, _ in of_file if text not in chinese()}
    assert not missing


def test_no_chinese_is_left_over() -> None:
    used = {text for of_file in texts().values() for text, _ in of_file}
    assert not chinese().keys() - used


def test_texts_that_are_filled_in_get_their_fields() -> None:
    for file, of_file in texts().items():
        for text, values in of_file:
            if values:
                assert fields(text) == values, (file, text)
                assert fields(chinese()[text]) == values, (file, text)


def test_the_fields_of_both_languages_are_the_same_with_the_same_formats() -> None:
    for text, spoken in chinese().items():
        formats = [{(name, spec) for _, name, spec, _ in string.Formatter().parse(t) if name} for t in (text, spoken)]
        assert formats[0] == formats[1], text


def test_a_text_is_translated_in_one_way_and_into_chinese() -> None:
    seen: dict[str, tuple[str, str]] = {}
    for path in TABLES:
        pairs = entries(path)
        assert len(dict(pairs)) == len(pairs), f"{path.name} has a text twice"
        for text, spoken in pairs:
            other, where = seen.setdefault(text, (spoken, path.name))
            assert spoken == other, f"{text!r} is {other!r} in {where} and {spoken!r} in {path.name}"
            assert any("\u4e00" <= letter <= "\u9fff" for letter in spoken), text
    assert seen.keys() == chinese().keys()


def test_the_language_is_that_of_the_innermost_block() -> None:
    assert current() == "en"
    with speaking("zh"):
        assert say("Loss") == "损失"
        assert say("true: {name}", name="{x} <b>") == "真实：{x} <b>"
        with speaking("en"):
            assert say("Loss") == "Loss"
        assert current() == "zh"
    assert say("true: {name}", name="cat") == "true: cat"


def test_a_text_without_an_entry_stays_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "chinese", dict)
    with speaking("zh"):
        assert say("Loss of {what}", what=1) == "Loss of 1"


def drawn(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))  # pyright: ignore[reportAttributeAccessIssue]


def figures() -> list[Figure]:
    history = [{"epoch": 1.0, "train_loss": 2.0, "val_accuracy": 0.5, "router_z_loss": 0.1}]
    return [training_curves(history), confusion_matrix([[1, 0], [0, 1]], ["a", "b"])]


def test_figures_speak_chinese_where_a_font_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffmoe.visualization.style._drawable", lambda: frozenset(range(0x110000)))
    with speaking("zh"):
        words = [drawn(figure) for figure in figures()]
    for text in ("损失", "训练", "最佳：50.0%，第 1 轮", "路由器 z 损失"):
        assert text in words[0]
    for text in ("混淆矩阵", "预测类别", "占真实类别的比例"):
        assert text in words[1]


@pytest.mark.usefixtures("only_base_font")
def test_figures_stay_english_where_no_font_has_chinese_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), speaking("zh"):
        words = [drawn(figure) for figure in figures()]
        assert current() == "zh"
    assert "Loss" in words[0]
    assert "Confusion matrix" in words[1]
    assert all(letter < "\u2e80" for letter in "".join(words))
    (message,) = caplog.messages
    assert message.startswith("no installed font can draw Chinese, so figures are in English instead; for Chinese inst")


@pytest.mark.usefixtures("only_base_font")
def test_english_needs_no_other_font(caplog: pytest.LogCaptureFixture) -> None:
    with styled():
        assert figure_language() == "en"
    assert not caplog.messages


def test_a_font_installed_since_matplotlib_listed_them_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manager = style.font_manager.fontManager
    new = next(font.fname for font in manager.ttflist if font.name == "DejaVu Serif")
    (tmp_path / "broken.ttf").write_text("no font")
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.name == style.BASE_FONT])
    monkeypatch.setattr(style, "CJK_FONTS", ("Not There", "DejaVu Serif"))
    monkeypatch.setattr(style.font_manager, "findSystemFonts", lambda: [str(tmp_path / "broken.ttf"), new])
    style.font_families.cache_clear()
    try:
        assert style.font_families() == [style.BASE_FONT, "DejaVu Serif"]
    finally:
        style.font_families.cache_clear()


def test_each_language_has_a_name_in_html() -> None:
    assert set(HTML_LANGUAGES) == set(LANGUAGES)
