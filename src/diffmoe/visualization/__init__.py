"""Figures from evaluation's outputs: pure functions that return a matplotlib Figure; and `save`."""

from diffmoe.visualization.attention import attention_maps, attention_rollout, class_maps, word_maps
from diffmoe.visualization.captions import caption_sheet, ranked_texts, retrieval_grid
from diffmoe.visualization.embedding import embedding_map
from diffmoe.visualization.experts import (
    ablation_map,
    coactivation_map,
    favourite_patches,
    load_over_time,
    router_confidence,
    routing_map,
    specialization,
    utilization,
)
from diffmoe.visualization.figures import (
    confusion_matrix,
    per_class,
    prediction_grid,
    reliability_diagram,
    save,
    training_curves,
)
from diffmoe.visualization.language import speaking
from diffmoe.visualization.profile import costs_by_part, throughput

__all__ = [
    "ablation_map",
    "attention_maps",
    "attention_rollout",
    "caption_sheet",
    "class_maps",
    "coactivation_map",
    "confusion_matrix",
    "costs_by_part",
    "embedding_map",
    "favourite_patches",
    "load_over_time",
    "per_class",
    "prediction_grid",
    "ranked_texts",
    "reliability_diagram",
    "retrieval_grid",
    "router_confidence",
    "routing_map",
    "save",
    "speaking",
    "specialization",
    "throughput",
    "training_curves",
    "utilization",
    "word_maps",
]
