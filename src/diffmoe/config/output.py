"""The settings of what is written and drawn: captions, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffmoe.config.errors import check, check_at_least, check_limits, expand


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How captions are written."""

    decoding: Literal["greedy", "beam", "sample"] = "beam"
    """'greedy' takes the likeliest token each time, 'beam' keeps the `beams` likeliest captions, 'sample' draws."""
    beams: int = 4
    """Captions that a beam search keeps."""
    length_penalty: float = 1.0
    """A finished beam's log-probability is divided by its length to this power: over 0 favours longer captions."""
    no_repeat_ngram: int = 3
    """No run of so many tokens comes twice in a caption; 0 is off."""
    min_caption_len: int = 0
    """A caption has at least so many tokens between its start and its end."""
    temperature: float = 1.0
    """With 'sample': logits are divided by it, so that under 1 is safer and over 1 more varied."""
    sample_top_k: int = 0
    """With 'sample': only the so many likeliest tokens are drawn; 0 is all."""
    sample_top_p: float = 1.0
    """With 'sample': only the likeliest tokens that have this much probability together are drawn; 1 is all."""

    def __post_init__(self) -> None:
        check_limits(self, beams=1000, length_penalty=10)
        check_at_least(self, 1, "beams")
        check_at_least(self, 0, "no_repeat_ngram", "min_caption_len", "sample_top_k", "length_penalty")
        check_at_least(self, 0.001, "temperature")
        check(0 < self.sample_top_p <= 1, "sample_top_p", self.sample_top_p, "over 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class VisualizationConfig:
    """The pictures that a run draws."""

    output_dir: str = "visualizations"
    """Folder for pictures and reports."""
    figure_format: Literal["png", "svg", "pdf"] = "png"
    """File format of the figures."""
    dpi: int = 150
    """Dots per inch of pictures that are not vector graphics."""
    examples: int = 24
    """Pictures in the grid of predictions, half of them wrong where there are enough."""
    weakest_classes: int = 50
    """The by-class figure shows at most so many classes, the worst ones."""

    def __post_init__(self) -> None:
        expand(self, "output_dir")
        check_limits(self, dpi=600, examples=200, weakest_classes=400)  # beyond, figures are too large to be drawn
        check_at_least(self, 30, "dpi")
        check_at_least(self, 1, "examples", "weakest_classes")
