"""How every figure looks: type, lines, fonts. One place, so that all figures look alike. Colours are in `colors`."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font, LoadFlags

from diffmoe.visualization.colors import theme_settings
from diffmoe.visualization.language import Language, chinese, current, say, speaking

logger = logging.getLogger(__name__)

RIGHT, WRONG = "✓", "✗"

FONT_SIZE = 9
SMALL = 8
GLYPH_WIDTH = 0.62
"""Width of a digit over the font size, about."""
HINTING = 1.08
"""Drawn text over its exact width, at most: at 72 dots an inch letters are moved to whole dots."""
LINE_HEIGHT = 1.4
"""A line over the font size, at most: with accents on capitals."""
LINE = SMALL * LINE_HEIGHT / 72
"""A line of small text, in inches."""

BASE_FONT = "DejaVu Sans"
"""Comes with matplotlib, so figures are the same on every machine; has the marks RIGHT and WRONG."""

CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans GB", "Heiti SC", "Heiti TC", "STHeiti", "Arial Unicode MS"),
    *("Microsoft YaHei", "SimHei"),
)
"""Fonts that have Chinese: Linux's, macOS's, Windows's; the first that is installed is used."""

SETTINGS: dict[Any, Any] = {
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE + 1,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "figure.titlesize": FONT_SIZE + 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,  # a class may be called "$5"
    "text.usetex": False,
    "svg.hashsalt": "diffmoe",  # the same figure has the same ids
}

_LOCK = RLock()


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this style, in the current theme and in a language that can be drawn; also a decorator.

    matplotlib's own settings are put back, and other threads wait.
    """
    settings = {**SETTINGS, **theme_settings(), "font.family": font_families()}
    with _LOCK, matplotlib.rc_context(settings), speaking(figure_language()):
        yield


def figure_language() -> Language:
    """The language of figures: the current one, or English where no font has its characters, which is said once."""
    letters = "".join("".join(chinese().values()).split())
    if current() == "zh" and not _drawable().issuperset(map(ord, letters)):
        _warn_of_missing_font("Chinese, so figures are in English")
        return "en"
    return current()


@cache
def font_families() -> list[str]:
    """The base font, and the first installed font that has Chinese."""
    if not _installed(CJK_FONTS):
        _look_for_new_fonts()
    return [BASE_FONT, *_installed(CJK_FONTS)[:1]]


def _installed(names: Sequence[str]) -> list[str]:
    """Those of `names` that matplotlib knows."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in names if name in known]


def _look_for_new_fonts() -> None:
    """Tell matplotlib of fonts installed since it listed them: it does so once and keeps the list in its cache."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError) as error:  # one of a kind that matplotlib cannot draw, such as emoji
            logger.debug("font %s is left out: %s", path, error)


def _font() -> FT2Font:
    """A font with the glyphs of all `font_families`."""
    return font_manager.get_font([font_manager.findfont(name, fallback_to_default=False) for name in font_families()])


@cache
def _drawable() -> frozenset[int]:
    """The code points for which `font_families` have a glyph."""
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in font_families()]
    return frozenset(point for path in paths for point in font_manager.get_font(path).get_charmap())


@cache
def _warn_of_missing_font(what: str) -> None:
    """Say each `what` once a process, not once a figure."""
    logger.warning(
        "no installed font can draw %s instead; "
        "for Chinese install one such as Noto Sans CJK (Debian: apt install fonts-noto-cjk)",
        what,
    )


def labels(class_names: Sequence[str], max_width: int = 24) -> list[str]:
    """Class names as they are drawn: on one line, at most `max_width` letters wide (a Chinese character counts two).

    A longer name loses its middle, because long names often differ at their ends. A name with characters that no
    installed font has is shown by its class number, and a warning is logged once.
    """
    return [_label(name, number, max_width) for number, name in enumerate(class_names)]


def _label(name: str, number: int, max_width: int) -> str:
    name = " ".join(name.split())
    if not all(ord(letter) in _drawable() for letter in name):
        _warn_of_missing_font("some class names, so figures show class numbers")
        return say("class {number}", number=number)
    if width(name) <= max_width:
        return name
    head, tail = "", ""
    for first, last in zip(name, reversed(name), strict=True):
        if width(head + first + tail) >= max_width:
            break
        head += first
        if width(head + last + tail) >= max_width:
            break
        tail = last + tail
    return f"{head.rstrip()}…{tail.lstrip()}"


def width(text: str) -> int:
    """Columns that `text` takes: one a letter, two a Chinese, Japanese or Korean character."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def inches(text: str, font_size: float) -> float:
    """How wide one line of `text` is at most when drawn at `font_size` points."""
    font = _font()
    font.clear()
    font.set_size(font_size, 720)
    font.set_text(text, flags=LoadFlags.NO_HINTING)
    return font.get_width_height()[0] / 64 / 720 * HINTING


def drawable(text: str) -> str:
    """`text` on one line, with "?" for each letter that no installed font has; a warning is then logged once."""
    line = " ".join(text.split())
    shown = "".join(letter if ord(letter) in _drawable() else "?" for letter in line)
    if shown != line:
        _warn_of_missing_font("some letters of texts, so figures show ?")
    return shown


def wrap(text: str, max_width: float, font_size: float, max_lines: int = 8) -> str:
    """`text`, made `drawable`, in lines at most `max_width` inches wide when drawn at `font_size` points.

    Lines end between words, and within a word that is wider than a line. What does not fit into `max_lines` is left
    out, and the last line ends in "…".
    """
    lines = [""]
    for word in drawable(text).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if inches(longer, font_size) <= max_width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        while len(lines) <= max_lines and inches(word, font_size) > max_width:
            fits = _num_letters_that_fit(word, max_width, font_size)
            lines[-1], word = word[:fits], word[fits:]
            lines.append("")
        lines[-1] = word
        if len(lines) > max_lines:
            last = lines[max_lines - 1]
            fits = _num_letters_that_fit(f"…{last}", max_width, font_size) - 1
            return "\n".join([*lines[: max_lines - 1], f"{last[:fits].rstrip()}…"])
    return "\n".join(lines)


def _num_letters_that_fit(text: str, max_width: float, font_size: float) -> int:
    """How many of the first letters fit, at least one."""
    count = 1
    while count < len(text) and inches(text[: count + 1], font_size) <= max_width:
        count += 1
    return count


def percent_tick(fraction: float, _position: float = 0) -> str:
    """`0.925` as `92.5%`, `0.9` as `90%`: what matplotlib's own formatter gives the same decimals everywhere."""
    return f"{100 * fraction:.6g}%"
