"""Figures from evaluation's outputs: pure functions that return a matplotlib Figure, and `save`."""

from diffmoe.visualization.captions import caption_sheet, ranked_texts, retrieval_grid
from diffmoe.visualization.figures import (
    confusion_matrix,
    per_class,
    prediction_grid,
    reliability_diagram,
    save,
    training_curves,
)

__all__ = [
    "caption_sheet",
    "confusion_matrix",
    "per_class",
    "prediction_grid",
    "ranked_texts",
    "reliability_diagram",
    "retrieval_grid",
    "save",
    "training_curves",
]
