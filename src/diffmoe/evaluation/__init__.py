"""Predictions as tensors, then metrics from them: of classes, of captions, of retrieval; and what the experts do."""

from diffmoe.evaluation.captions import caption_metrics
from diffmoe.evaluation.retrieval import retrieval_metrics

__all__ = ["caption_metrics", "retrieval_metrics"]
