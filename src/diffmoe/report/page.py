"""One HTML page that holds everything: figures, tables and words, with nothing fetched from anywhere.

It knows nothing of models: it is handed sections, and puts them under a table of contents.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from diffmoe.files import write_atomically
from diffmoe.visualization.colors import DARK, LIGHT, Theme, shown_in
from diffmoe.visualization.language import Language, say, speaking
from diffmoe.visualization.style import figure_language, styled

TEMPLATE = "page.html"
HTML_LANGUAGES: dict[Language, str] = {"en": "en", "zh": "zh-Hans"}
LARGEST_SVG = 150_000
"""A figure whose SVG is larger, in bytes, is embedded as PNG: one of many points or pictures."""
PNG_DPI = 150
HOW_TO_READ = "How to read it: "
"""How the docstring of a figure's function begins."""

Drawing = Callable[[], Figure]
"""A figure to be drawn, in the current theme and language: for the light, for the dark, for a file."""
Table = Sequence[Sequence[object]]
"""Rows of cells; the first row is the heads of the columns."""


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    drawings: Sequence[Drawing]
    reading: str
    """How to read the figures, in a sentence or two."""
    note: str = ""
    """What the figures show here: a number to remember, how many pictures it is of."""
    table: Table = ()


@dataclass(frozen=True)
class Facts:
    """What stands above the sections."""

    summary: Sequence[tuple[str, object]] = ()
    """Name and value: the data, the accuracy, the number of parameters."""
    notes: Sequence[str] = ()
    """What the reader must know first, such as what was left out and why."""
    settings: Sequence[tuple[str, object]] = ()
    """The model's config, folded away."""
    command: str = ""
    """What made the report."""


def how_to_read(draw: Callable[..., Figure]) -> str:
    """The paragraph that the docstring of a figure's function begins with, in the current language."""
    first = " ".join((draw.__doc__ or "").partition("\n\n")[0].split())
    if not first.startswith(HOW_TO_READ):
        raise ValueError(f"the docstring of {draw.__name__} must begin with {HOW_TO_READ!r}")
    return say(first.removeprefix(HOW_TO_READ))


def write_report(
    path: Path, title: str, sections: Iterable[Section], language: Language, facts: Facts = Facts()
) -> Path:
    """Write the page; `sections` may be a generator: each one's figures are kept as text only, then the next is made.

    Whatever texts hold, such as a class called "<script>", is shown as it is. Raises `UserError` where the file cannot
    be written.
    """
    with speaking(language):
        kept = [(replace(section, drawings=()), _embed(section)) for section in sections]
        notes = list(facts.notes)
        if figure_language() != language:
            notes.append(say("The figures are in English: no font that has Chinese characters is installed here."))
        page = _template().render(
            language=HTML_LANGUAGES[language],
            title=title,
            facts=replace(facts, notes=notes),
            sections=kept,
            words={
                "contents": say("Contents"),
                "reading": say("How to read it: "),
                "settings": say("Settings of the model"),
                "command": say("Command"),
                "enlarge": say("Enlarge: {title}"),
                "top": say("Back to the top"),
                "hint": say("A tap on a figure shows it at full size; a wide one is moved sideways."),
            },
        )
    write_atomically(path, lambda unfinished: unfinished.write_text(page, encoding="utf-8"))
    return path


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE)


@dataclass(frozen=True)
class _Embedded:
    """A figure as the page has it."""

    light: str
    dark: str
    """Addresses that hold all of it, in both themes."""
    alt: str
    width: int


def _embed(section: Section) -> list[_Embedded]:
    embedded, count = [], len(section.drawings)
    for number, draw in enumerate(section.drawings, 1):
        alt = section.title if count == 1 else f"{section.title} ({number}/{count})"
        (light, width), (dark, _) = (_drawn(draw, theme) for theme in (LIGHT, DARK))
        embedded.append(_Embedded(light, dark, alt, width))
    return embedded


def _drawn(draw: Drawing, theme: Theme) -> tuple[str, int]:
    """A figure's address, and its width in CSS pixels at its own size."""
    with shown_in(theme):
        figure = draw()
        return data_uri(figure), round(96 * figure.get_figwidth())


def data_uri(figure: Figure) -> str:
    """The figure as the address of an `<img>`: SVG, which is sharp at any size, or PNG where that would be large.

    As an image rather than as elements of the page: no id of one figure meets those of another, and no text in it can
    become code.
    """
    svg = _rendered(figure, "svg")
    if len(svg) <= LARGEST_SVG:
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return f"data:image/png;base64,{base64.b64encode(_rendered(figure, 'png')).decode()}"


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # No date: the same figures make the same page.
    metadata = {"Date": None} if kind == "svg" else None
    with styled():
        figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()
