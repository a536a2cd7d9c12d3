"""Figures from evaluation's outputs: pure functions that return a matplotlib Figure, and `save`."""

from diffmoe.visualization.figures import (
    confusion_matrix,
    per_class,
    prediction_grid,
    reliability_diagram,
    save,
    training_curves,
)

__all__ = ["confusion_matrix", "per_class", "prediction_grid", "reliability_diagram", "save", "training_curves"]
