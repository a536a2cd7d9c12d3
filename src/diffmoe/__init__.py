"""Diff-MoE: a multimodal (image + text) Mixture-of-Experts Transformer.

    from diffmoe import Captioner, ImageClassifier, ModelConfig, MultiModalMoE, load_model    # the model
    from diffmoe import Predictor, test, train                                                # and its use

The names load on first use, so that `diffmoe --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmoe.config import ModelConfig
    from diffmoe.inference import Predictor
    from diffmoe.model.captioner import Captioner
    from diffmoe.model.heads import ImageClassifier
    from diffmoe.model.multimodal import MultiModalMoE
    from diffmoe.runs import test, train
    from diffmoe.storage.model_files import load_model

__all__ = [
    "Captioner",
    "ImageClassifier",
    "ModelConfig",
    "MultiModalMoE",
    "Predictor",
    "load_model",
    "test",
    "train",
]

_HOME = {
    "Captioner": "diffmoe.model.captioner",
    "ImageClassifier": "diffmoe.model.heads",
    "ModelConfig": "diffmoe.config",
    "MultiModalMoE": "diffmoe.model.multimodal",
    "Predictor": "diffmoe.inference",
    "load_model": "diffmoe.storage.model_files",
    "test": "diffmoe.runs",
    "train": "diffmoe.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffmoe' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
