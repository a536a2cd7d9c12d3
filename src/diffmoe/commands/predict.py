"""`predict`: the classes of single pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffmoe.checkpoint import load_checkpoint
from diffmoe.commands.preparation import EVALUATION_BATCH
from diffmoe.data import normalize, read_picture
from diffmoe.hardware import pick_device


def predict(images: Sequence[str], checkpoint_path: str, top: int, device: str) -> list[dict[str, Any]]:
    """The `top` most probable classes of each picture: `[{image, predictions: [{class, probability}]}]`."""
    checkpoint = load_checkpoint(checkpoint_path)
    config, info = checkpoint.model.config, checkpoint.data
    pictures = [read_picture(path, img_size=config.img_size, in_channels=config.in_channels) for path in images]
    where = pick_device(device)
    model = checkpoint.model.to(where)
    probabilities: list[Tensor] = []
    with torch.inference_mode():
        classes = model.class_features()
        for chunk in torch.stack(pictures).split(EVALUATION_BATCH):
            out = model(normalize(chunk.to(where), info.mean, info.std), classes=classes)
            probabilities.append(out["logits"].float().softmax(-1).cpu())
    results = []
    for path, row in zip(images, torch.cat(probabilities), strict=True):
        best = row.topk(min(top, len(row)))
        ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found = [{"class": info.class_names[index], "probability": value} for index, value in ranked]
        results.append({"image": str(path), "predictions": found})
    return results
