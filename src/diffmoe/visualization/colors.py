"""The colours of figures. Those of data are the same everywhere; what is around the data follows the theme.

A page that is looked at in the dark has each figure twice, drawn in both themes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex, to_rgb

# Okabe and Ito 2008: told apart with every common form of colour blindness, and in grey.
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
EXPERT_COLORS = (
    *(BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, "#F0E442", "#5D3A9B"),
    *("#B39DDB", "#8C6D31", "#14213D", "#A3D4A0", "#7F0000", "#C2C2C2", "#004D40", "#FFB6A3"),
)
"""An expert's colour by its number: the eight of a tiny model are told apart by everybody."""

BLACK = "#222222"
"""What is written on a light colour, in any theme."""
LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue in grey (ITU-R BT.601)."""


@dataclass(frozen=True)
class Theme:
    """The colours of what is around the data."""

    ground: str
    """What is drawn on."""
    ink: str
    muted: str
    grid: str
    right: str
    wrong: str
    """Of right and wrong answers, in words and frames."""
    shares: Colormap
    """From none, which is almost the ground, to the largest share."""
    changes: Colormap
    """From loss, red, through none, which is almost the ground, to gain, blue."""

    def over_ground(self, color: str, opacity: float) -> str:
        """`color` as it looks where it is not quite opaque, itself opaque."""
        channels = zip(to_rgb(color), to_rgb(self.ground), strict=True)
        red, green, blue = (opacity * above + (1 - opacity) * below for above, below in channels)
        return to_hex((red, green, blue))


LIGHT = Theme(
    *("white", BLACK, "#6B6B6B", "#E3E3E3", BLUE, VERMILLION),
    *(matplotlib.colormaps["Blues"], matplotlib.colormaps["RdBu"]),
)
DARK = Theme(
    *("#1F2127", "#E8E8EC", "#A4A7AE", "#3A3D45", SKY, "#F08A4B"),
    LinearSegmentedColormap.from_list("shares", ["#262930", BLUE, "#D6ECFF"]),
    LinearSegmentedColormap.from_list("changes", ["#FF5A3C", "#262930", SKY]),
)
THEMES = {"light": LIGHT, "dark": DARK}
_current: ContextVar[Theme] = ContextVar("theme", default=LIGHT)


@contextmanager
def shown_in(theme: Theme) -> Iterator[None]:
    """Within it, figures are drawn in `theme`; both drawing and saving them belong in it."""
    token = _current.set(theme)
    try:
        yield
    finally:
        _current.reset(token)


def theme() -> Theme:
    """The theme that figures are drawn in now."""
    return _current.get()


def theme_settings() -> dict[Any, Any]:
    """The current theme, as settings of matplotlib's."""
    colors = theme()
    return {
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), colors.ground),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), colors.ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), colors.muted),
        "grid.color": colors.grid,
    }


def expert_color(expert: int) -> str:
    """The colour of expert number `expert` in every figure; the 17th has the first one's again."""
    return EXPERT_COLORS[expert % len(EXPERT_COLORS)]


def ink_on(color: Any) -> str:
    """White or black, whichever is read better on `color`, as matplotlib takes colours."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    # WCAG 2.1's luminance; at 0.21 white's contrast and black's are equal.
    return BLACK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.21 else "white"
