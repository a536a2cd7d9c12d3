"""`predict` and `zero-shot`: the classes of single pictures, from the head, from a text beside them, from any names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.commands.preparation import EVALUATION_BATCH
from diffmoe.commands.use import UsedModel, open_model
from diffmoe.config import UserError
from diffmoe.data import tokenize
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier

TEMPLATES = ("{}", "a photo of a {}.", "a picture that shows a {}.")
"""Sentences in which {} stands for a label, where nobody says others."""


def predict(
    images: Sequence[str], checkpoint: str, top: int, device: str, text: str | None = None
) -> list[dict[str, Any]]:
    """The `top` most probable classes of each picture: `[{image, predictions: [{class, probability}]}]`.

    With `text`, said of every picture: `similarity` is the cosine of picture and text. A classifier adds
    `with_text`, its predictions when the text counts as much as the picture; a captioner, which has no classes, adds
    `log_probability`, that of the text as this picture's caption, a token.
    """
    used = open_model(checkpoint, device)
    pictures = used.read(images)
    results: list[dict[str, Any]] = [{"image": str(path)} for path in images]
    if isinstance(used.model, ImageClassifier):
        probabilities, given_text = _classify(used, used.model, pictures, text)
        for result, row in zip(results, probabilities, strict=True):
            result["predictions"] = _ranked(row, used.info.class_names, top)
        if given_text is not None:
            both = probabilities * given_text
            for result, row in zip(results, both / both.sum(1, keepdim=True), strict=True):
                result["with_text"] = _ranked(row, used.info.class_names, top)
    elif text is None:
        raise UserError(f"{checkpoint} has no classes: diffmoe caption writes captions; predict needs --text with it")
    else:
        for result, value in zip(results, _caption_log_probability(used, used.model, pictures, text), strict=True):
            result["log_probability"] = value
    if text is not None:
        cosines = used.encode_pictures(pictures) @ used.encode_texts([text])[0]
        for result, cosine in zip(results, cosines.tolist(), strict=True):
            result["similarity"] = cosine
    return results


def _classify(
    used: UsedModel, model: ImageClassifier, pictures: Tensor, text: str | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the classes given each picture, (N, C), and given the text alone, (C,).

    Picture and text are taken as independent given the class: their product, scaled, is the probability given both.
    """
    with torch.inference_mode():
        classes = used.classes
        chunks = [
            model(used.prepare(part), classes=classes, need_losses=False)["logits"].float()
            for part in pictures.split(EVALUATION_BATCH)
        ]
        probabilities = torch.cat(chunks).softmax(-1).cpu()
        if text is None:
            return probabilities, None
        if classes is None:
            raise UserError("text needs a model that was trained with class descriptions")
        similarity = classes.embedding.float().cpu() @ used.encode_texts([text])[0]
        return probabilities, (used.backbone.scale.detach().cpu() * similarity).softmax(-1)


def _caption_log_probability(used: UsedModel, model: Captioner, pictures: Tensor, text: str) -> list[float]:
    tokens, mask = (t.to(used.device) for t in tokenize([text], model.config.max_text_len))
    values = []
    with torch.inference_mode():
        for picture in pictures:
            _, _, features = model.read(used.prepare(picture[None]), tokens, mask)
            values.append(-float(model.caption_loss(features, tokens, mask)[0]))
    return values


def _ranked(probabilities: Tensor, names: Sequence[str], top: int) -> list[dict[str, Any]]:
    best = probabilities.topk(min(top, len(probabilities)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"class": names[index], "probability": value} for index, value in pairs]


def zero_shot(
    images: Sequence[str], labels: Sequence[str], templates: Sequence[str], checkpoint: str, device: str
) -> list[dict[str, Any]]:
    """The probability of each label for each picture, most probable first, as `predict` gives them.

    A label is a class name or a whole sentence; `{}` in a template stands for it. The embeddings of a label's
    sentences are averaged (Radford et al. 2021, section 3.1.4).
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template is {template!r}: it must contain {{}}, where the label goes")
    if len(set(labels)) < 2:
        raise UserError(f"labels are {', '.join(labels)}: there must be at least 2 different ones")
    used = open_model(checkpoint, device)
    probabilities = label_probabilities(used, used.read(images), labels, templates)
    return [
        {"image": str(path), "predictions": _ranked(row, labels, len(labels))}
        for path, row in zip(images, probabilities, strict=True)
    ]


def label_probabilities(used: UsedModel, pictures: Tensor, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Of each of L labels for each picture, uint8 (N, C, H, W): (N, L), rows sum to 1. As `zero_shot` says."""
    sentences = [template.replace("{}", label) for label in labels for template in templates]
    embeddings = used.encode_texts(sentences).unflatten(0, (len(labels), len(templates)))
    classes = F.normalize(embeddings.mean(1), dim=-1)
    return (used.backbone.scale.detach().cpu() * used.encode_pictures(pictures) @ classes.T).softmax(-1)
