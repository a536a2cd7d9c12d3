"""Whether what is written in a figure can be read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def assert_apart(canvas: FigureCanvasAgg, texts: Sequence[Text], pictures: Sequence[Axes] = ()) -> None:
    """On a drawn canvas no text overlaps another one or a picture, and nothing leaves the figure."""
    boxes = [text.get_window_extent(canvas.get_renderer()).extents for text in texts]
    boxes += [axes.get_window_extent().extents for axes in pictures]
    names = [text.get_text() for text in texts] + ["a picture"] * len(pictures)
    x0, y0, x1, y1 = np.array(boxes).T
    width, height = canvas.get_width_height()
    outside = (x0 < -1) | (y0 < -1) | (x1 > width + 1) | (y1 > height + 1)
    assert not outside.any(), [names[i] for i in np.flatnonzero(outside)]
    shared_width = np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0)
    shared_height = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0)
    overlaps = np.triu((shared_width > 1) & (shared_height > 1), k=1)
    assert not overlaps.any(), [(names[i], names[j]) for i, j in np.argwhere(overlaps)]
