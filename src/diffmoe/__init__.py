"""Diff-MoE: a multimodal (image + text) Mixture-of-Experts Transformer.

    from diffmoe import Captioner, ImageClassifier, ModelConfig, MultiModalMoE, load_model

The names load on first use, so that `diffmoe --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmoe.checkpoint import load_model
    from diffmoe.config import ModelConfig
    from diffmoe.model.captioner import Captioner
    from diffmoe.model.heads import ImageClassifier
    from diffmoe.model.multimodal import MultiModalMoE

__all__ = ["Captioner", "ImageClassifier", "ModelConfig", "MultiModalMoE", "load_model"]

_HOME = {
    "Captioner": "diffmoe.model.captioner",
    "ImageClassifier": "diffmoe.model.heads",
    "ModelConfig": "diffmoe.config",
    "MultiModalMoE": "diffmoe.model.multimodal",
    "load_model": "diffmoe.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffmoe' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
