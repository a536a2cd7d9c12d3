"""A trained model with all that it takes to use it: pictures in, rows out. Commands, page and report stand on it.

Shapes: N pictures, C channels, H height, W width, D width of an embedding, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffmoe.baselines import Baseline
from diffmoe.config import GenerationConfig, UserError
from diffmoe.config.recipes import generation_config
from diffmoe.data.pictures import LazyImages
from diffmoe.data.text import tokenize
from diffmoe.evaluation.experts import BlockRouting
from diffmoe.evaluation.views import views
from diffmoe.hardware import pick_device, use_fast_matmul
from diffmoe.model.encoders import AttentionMap
from diffmoe.model.multimodal import MultiModalMoE
from diffmoe.model.outputs import TextFeatures
from diffmoe.storage.model_files import load_model_file
from diffmoe.tasks import task_of_model

TEMPLATES = ("{}", "a photo of a {}.", "a picture that shows a {}.")
"""Sentences in which {} stands for a label, where nobody says others."""

Picture = str | Path | Image.Image
Pictures = Picture | Sequence[Picture] | Tensor | LazyImages
"""A picture or several: paths, PIL pictures of any mode and size, or uint8 (N, C, H, W) of the model's size."""
Row = dict[str, Any]


class Predictor:
    """A trained model, ready to use.

        p = Predictor("checkpoints/cifar10_model.pth")
        p.classify(["cat.jpg", "dog.jpg"], top=3)   # [{"image": "cat.jpg", "predictions": [{"class", "probability"}]}]

    A row belongs to a picture, in their order; its `image` is the path, None where the picture was no path.

    Args:
        checkpoint: a model file.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: where the file will not do, or the device is not there.
    """

    def __init__(self, checkpoint: str | Path, device: str = "auto") -> None:
        self.device = pick_device(device)
        loaded = load_model_file(checkpoint)
        use_fast_matmul()
        self.checkpoint = str(checkpoint)
        self.model = loaded.model.to(self.device)
        self.info, self.picture, self.temperature = loaded.data, loaded.picture, loaded.temperature
        self.task = task_of_model(self.model)

    @property
    def backbone(self) -> MultiModalMoE:
        """The two towers and the fusion. Raises `UserError` where the model is a baseline, which has none."""
        if isinstance(self.model, Baseline):
            kind = self.model.config.architecture
            raise UserError(f"the model in {self.checkpoint} is a baseline ({kind}): it can classify and no more")
        return self.model.backbone

    @property
    def has_classes(self) -> bool:
        """Whether it can `classify`."""
        return bool(self.info.class_names)

    @property
    def reads_texts(self) -> bool:
        """Whether it was taught to compare a picture with a text."""
        return self.task.reads_texts(self.model)

    @cached_property
    def classes(self) -> TextFeatures | None:
        """The descriptions of the classes, read once; None where the model has none."""
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, whoever asks first
            return self.model.class_features()

    def read(self, pictures: Pictures) -> Tensor | LazyImages:
        """As uint8 (N, C, H, W) of the model's size. Raises `UserError` naming a file that is no picture."""
        if not isinstance(pictures, Picture) and not len(pictures):
            raise UserError("there are no pictures: there must be at least 1")
        if isinstance(pictures, Tensor | LazyImages):
            return pictures
        several = [pictures] if isinstance(pictures, Picture) else pictures
        return torch.stack([self.picture.read(picture) for picture in several])

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> normalised float32, on the device."""
        return self.picture.normalize(pixels.to(self.device))

    def classify(self, pictures: Pictures, top: int = 5, tta: str = "none") -> list[Row]:
        """The `top` most probable classes: `{image, predictions: [{class, probability}]}`."""
        probabilities = self.probabilities(pictures, tta)
        return self._rows(pictures, [{"predictions": self._ranked(row, top)} for row in probabilities])

    def probabilities(self, pictures: Pictures, tta: str = "none") -> Tensor:
        """Of each class, (N, classes) float32 on the CPU; their mean over the `views` that `tta` names.

        softmax(logits / temperature), where the file's temperature says how sure a model may be: fitted on validation.
        Raises `UserError` where the model has no classes, or `tta` is none of them.
        """
        chunks: list[Tensor] = []
        with torch.inference_mode():
            for part in self._batches(pictures):
                by_view = [
                    self.task.classify(self.model, view, self.classes, self.temperature) for view in views(part, tta)
                ]
                chunks.append(torch.stack(by_view).mean(0))
        return torch.cat(chunks).clone()

    def zero_shot(self, pictures: Pictures, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[Row]:
        """The probability of each label, the most probable first: rows as `classify` gives them."""
        labels = [labels] if isinstance(labels, str) else list(dict.fromkeys(labels))
        rows = self.label_probabilities(pictures, labels, templates)
        return self._rows(pictures, [{"predictions": _ranked(row, labels, len(labels))} for row in rows])

    def label_probabilities(
        self, pictures: Pictures, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> Tensor:
        """Of each of L labels for each picture: (N, L) float32 on the CPU, rows sum to 1.

        A label is a class name or a whole sentence; `{}` in a template stands for it. The embeddings of a label's
        sentences are averaged (Radford et al. 2021, section 3.1.4). Raises `UserError` for labels or templates that
        tell nothing apart.
        """
        check_labels(labels, templates)
        sentences = [template.replace("{}", label) for label in labels for template in templates]
        embeddings = self.embed_texts(sentences).unflatten(0, (len(labels), len(templates)))
        classes = F.normalize(embeddings.mean(1), dim=-1)
        return (self.backbone.scale.detach().cpu() * self.embed_images(pictures) @ classes.T).softmax(-1)

    def caption(
        self, pictures: Pictures, config: GenerationConfig | None = None, seed: int = 0, **fields: Any
    ) -> list[Row]:
        """A sentence for each: `{image, caption}`.

        Written as `config` says, or the recipe of the model's dataset, but for the `fields` of `GenerationConfig` that
        are given. `seed` is for decoding 'sample'.
        """
        config = replace(config or generation_config(self.info.known_as), **fields)
        captions: list[str] = []
        for part in self._batches(pictures):
            captions += self.task.caption(self.model, part, config, seed + len(captions))
        return self._rows(pictures, [{"caption": caption} for caption in captions])

    def compare(self, pictures: Pictures, text: str, top: int = 5) -> list[Row]:
        """What a text that is said of every picture changes: `{image, similarity, ...}`, the cosine of the two.

        A classifier adds `with_text`, its classes where the text counts as much as the picture; a captioner
        `log_probability`, that of the text as this picture's caption, in nats a token; None where it cannot write all
        of it, and then `cannot_write`, the words.
        """
        cosines = self.embed_images(pictures) @ self.embed_texts([text])[0]
        rows: list[Row] = [{"similarity": cosine} for cosine in cosines.tolist()]
        with torch.inference_mode():
            told: list[dict[str, object]] = []
            for part in self._batches(pictures):
                told += self.task.compare(self.model, part, text, self.classes, self.temperature)
        for row, more in zip(rows, told, strict=True):
            row |= {name: self._ranked(v, top) if isinstance(v, Tensor) else v for name, v in more.items()}
        return self._rows(pictures, rows)

    def embed_images(self, pictures: Pictures) -> Tensor:
        """Unit-norm embeddings, float32 (N, D) on the CPU."""
        with torch.inference_mode():
            chunks = [self.backbone.encode_image(part).float().cpu() for part in self._batches(pictures)]
        return torch.cat(chunks).clone()

    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        """Unit-norm embeddings of N texts, float32 (N, D) on the CPU. Those over the model's max_text_len are cut."""
        texts = [texts] if isinstance(texts, str) else texts
        if not texts:
            raise UserError("there are no texts: there must be at least 1")
        if not self.reads_texts:
            raise UserError("this model was trained without class descriptions: it cannot compare pictures with texts")
        chunks, size = [], self.picture.evaluation_batch
        with torch.inference_mode():
            for start in range(0, len(texts), size):
                tokens, mask = tokenize(texts[start : start + size], self.model.config.max_text_len)
                chunks.append(self.backbone.encode_text(tokens.to(self.device), mask.to(self.device)).float().cpu())
        return torch.cat(chunks).clone()

    def routing(self, pictures: Pictures) -> tuple[BlockRouting, ...]:
        """Which expert takes which patch: one for each block of the image tower, none where the model is dense."""
        with torch.inference_mode():
            features = self.backbone.image_features(self._all(pictures))
        return tuple(BlockRouting.of(routing) for routing in features.routing)

    def attention(self, pictures: Pictures) -> tuple[AttentionMap, ...]:
        """Where the image tower looks, a map for each block."""
        with torch.inference_mode():
            return self.backbone.image_features(self._all(pictures), need_weights=True).attention

    def _all(self, pictures: Pictures) -> Tensor:
        return torch.cat(list(self._batches(pictures)))

    def _batches(self, pictures: Pictures) -> Iterator[Tensor]:
        pixels = self.read(pictures)
        for rows in torch.arange(len(pixels)).split(self.picture.evaluation_batch):
            yield self.prepare(pixels[rows])

    def _rows(self, pictures: Pictures, rows: list[Row]) -> list[Row]:
        several = [pictures] if isinstance(pictures, Picture) else pictures
        named = [] if isinstance(several, Tensor | LazyImages) else several
        names = [str(picture) if isinstance(picture, str | Path) else None for picture in named] or [None] * len(rows)
        return [{"image": name, **row} for name, row in zip(names, rows, strict=True)]

    def _ranked(self, probabilities: Tensor, top: int) -> list[Row]:
        return _ranked(probabilities, self.info.class_names, top)


def check_labels(labels: Sequence[str], templates: Sequence[str]) -> None:
    """Raises `UserError` for labels or templates that tell nothing apart."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template is {template!r}: it must contain {{}}, where the label goes")
    if len(set(labels)) < 2:
        raise UserError(f"labels are {', '.join(labels)}: there must be at least 2 different ones")


def _ranked(probabilities: Tensor, names: Sequence[str], top: int) -> list[Row]:
    best = probabilities.topk(min(top, len(probabilities)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"class": names[index], "probability": value} for index, value in pairs]
