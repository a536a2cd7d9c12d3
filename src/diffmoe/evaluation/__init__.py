"""Predictions as tensors, then metrics from them: of classes, of captions, of retrieval."""

from diffmoe.evaluation.captions import (
    caption_metrics,
    constant_caption,
    missing_metrics,
    nearest_pictures,
    normalize_captions,
)
from diffmoe.evaluation.classification import (
    CALIBRATION_BINS,
    CalibrationBins,
    Predictions,
    calibration_bins,
    calibration_error,
    classification_metrics,
    evaluating,
    finite_or_told,
    pick_examples,
    predict,
)
from diffmoe.evaluation.retrieval import ranks, retrieval_metrics, word_vectors

__all__ = [
    "CALIBRATION_BINS",
    "CalibrationBins",
    "Predictions",
    "calibration_bins",
    "calibration_error",
    "caption_metrics",
    "classification_metrics",
    "constant_caption",
    "evaluating",
    "finite_or_told",
    "missing_metrics",
    "nearest_pictures",
    "normalize_captions",
    "pick_examples",
    "predict",
    "ranks",
    "retrieval_metrics",
    "word_vectors",
]
