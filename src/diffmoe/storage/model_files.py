"""Saving and loading a model file that stands alone.

A model file is a dict of tensors, numbers and strings that `torch.load(weights_only=True)` opens: a pickle with code
in it is refused.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffmoe.baselines import Baseline
from diffmoe.config import DataConfig, ModelConfig, UserError, dataset_name, expanded
from diffmoe.data.loading import Dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.files import write_atomically
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import Classifier, Head, ImageClassifier

MODEL_FORMAT = "diffmoe-model-1"
OWN_FORMATS = "diffmoe-"
"""What the format of every file that this program wrote begins with."""

HEADS: dict[str, type[Head]] = {head.kind: head for head in (ImageClassifier, Captioner, Baseline)}
"""By what a model file calls each; a file that says nothing holds a classifier."""


@dataclass(frozen=True)
class DataInfo:
    """What a model must know of the data it was trained on to be used without it."""

    dataset: str
    class_names: tuple[str, ...]
    """Empty where the pictures have captions."""
    mean: tuple[float, ...]
    """Of the training pictures in [0, 1], a channel."""
    std: tuple[float, ...]
    val_fraction: float
    test_fraction: float
    split_seed: int
    """How the set was split, so that testing never meets what training saw."""
    own: bool = False
    """Whether it is a set of the user's that is called as one that the program brings."""

    @classmethod
    def of(cls, data: Dataset, config: DataConfig) -> DataInfo:
        """Of a set that was loaded with `config`."""
        splits = {name: getattr(config, name) for name in SPLITTING}
        own = data.known_as != data.name
        return cls(data.name, data.class_names, data.picture.mean, data.picture.std, **splits, own=own)

    @property
    def known_as(self) -> str:
        """The name, where what the program knows of a set so called holds for this one; else empty."""
        return "" if self.own else self.dataset

    def check_source(self, config: DataConfig, path: str | Path) -> None:
        """Raises `UserError` where `config` leads to another set than the one that the model in `path` was trained on.

        By name alone it would be the one that the program brings.
        """
        if self.own and config.built_in:
            raise UserError(
                f"{path} was trained on a set of your own called {self.dataset}, not on the one that the program "
                f"brings: say where yours is, with --data_dir DIR or --dataset DIR/{self.dataset}"
            )

    def split_as_trained(self, config: DataConfig) -> DataConfig:
        """The same data, split as it was for training."""
        return dataclasses.replace(config, **{name: getattr(self, name) for name in SPLITTING})


SPLITTING = ("val_fraction", "test_fraction", "split_seed")


@dataclass(frozen=True)
class ModelFile:
    """A loaded model file."""

    model: Head
    """On the CPU, in evaluation mode."""
    data: DataInfo
    temperature: float
    """What a classifier's logits are divided by, to be as sure as it is right; 1 where nothing is known."""

    @property
    def picture(self) -> PictureSpec:
        """What a picture is to the model."""
        config = self.model.config
        return PictureSpec(config.img_size, config.in_channels, self.data.mean, self.data.std)


def save_model(
    path: Path,
    model: Head,
    data: DataInfo,
    state: Mapping[str, torch.Tensor] | None = None,
    temperature: float = 1.0,
) -> None:
    """Write a model with the config that made it, what it needs to know of its data, and its temperature.

    `state` is its state dict where it had to be gathered.
    """
    content = {
        "format": MODEL_FORMAT,
        "head": model.kind,
        "model_config": dataclasses.asdict(model.config),
        "data": dataclasses.asdict(data),
        "temperature": temperature,
        "state_dict": model.state_dict() if state is None else state,
    }
    write(path, content)


def write(path: Path, content: Mapping[str, object]) -> None:
    """Save atomically. Through memory: torch reports a full disk as a failure of its own."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, lambda unfinished: unfinished.write_bytes(buffer.getbuffer()))


def read(path: str | Path, kind: str) -> dict[str, Any]:
    """The dict in a file that this program wrote. Raises `UserError` naming the path and what is wrong with it.

    `kind` is the format expected: `MODEL_FORMAT` for a model file.
    """
    path = Path(expanded(str(path)))
    if not os.path.isfile(path):  # Path's own raises on a name that is too long
        raise UserError(f"checkpoint {path} does not exist")
    # Only torch's zip files are ours: nothing else is unpickled at all, not even warily.
    if not zipfile.is_zipfile(path):
        raise UserError(f"checkpoint {path} is truncated or is not a checkpoint")
    _check_records(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} is refused: it holds code, not only tensors") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path} is truncated or is not a checkpoint") from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, str) or found != kind:
        was = found if isinstance(found, str) else "something else"
        raise UserError(f"checkpoint {path} is not a {kind} file but {was}")
    return content


def is_own_file(path: str | Path) -> bool:
    """Whether it is a file that says it was written by this program; `read` tells of which kind, and whether whole."""
    place = expanded(str(path))
    if not os.path.isfile(place) or not zipfile.is_zipfile(place):
        return False
    try:
        content = torch.load(place, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        return False
    return isinstance(content, dict) and str(content.get("format")).startswith(OWN_FORMATS)


def _check_records(path: Path) -> None:
    """Raises `UserError` where a part of the file is not as it was written.

    torch writes a CRC-32 beside each record, and does not look at it when it reads.
    """
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError, struct.error) as error:
        raise UserError(f"checkpoint {path} is truncated or is not a checkpoint") from error
    if damaged is not None:
        raise UserError(f"checkpoint {path} is damaged: {damaged} in it is not as it was written")


def load_model_file(path: str | Path) -> ModelFile:
    """A model file. Raises `UserError` naming the path and what is wrong with it."""
    content = read(path, MODEL_FORMAT)
    try:
        state: dict[str, torch.Tensor] = content["state_dict"]
        config = ModelConfig(**content["model_config"])
        data = DataInfo(**content["data"])
        model = _head(content.get("head", ImageClassifier.kind)).restore(config, state)
        model.load_state_dict(state)
    except (TypeError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"checkpoint {path} does not fit this version: {' '.join(str(error).split())[:200]}") from error
    temperature = content.get("temperature", 1.0)  # files written before had none
    _check_values(path, model, data, temperature)
    return ModelFile(model.eval(), data, temperature)


def _check_values(path: str | Path, model: Head, data: DataInfo, temperature: Any) -> None:
    """Raises `UserError` naming what in a file is of the right kind and yet cannot be."""

    def check(holds: bool, wrong: str) -> None:
        if not holds:
            raise UserError(f"checkpoint {path} is damaged: {wrong}")

    config, names = model.config, data.class_names
    check_finite(path, model.state_dict())
    for name, allowed in (("mean", lambda value: 0 <= value < math.inf), ("std", lambda value: 0 < value < math.inf)):
        values = getattr(data, name)
        fits = isinstance(values, list | tuple) and len(values) == config.in_channels
        good = fits and all(isinstance(value, int | float) and allowed(value) for value in values)
        right = f"{config.in_channels} finite numbers {'from 0 on' if name == 'mean' else 'over 0'}"
        check(good, f"{name} is {reprlib.repr(values)}: it must be {right}")
    is_number = isinstance(temperature, int | float) and 0 < temperature < math.inf
    check(is_number, f"temperature is {reprlib.repr(temperature)}: it must be a finite number over 0")
    check(isinstance(data.own, bool), f"own is {reprlib.repr(data.own)}: it must be true or false")
    is_name = isinstance(data.dataset, str) and data.dataset == dataset_name(data.dataset)
    check(is_name, f"dataset is {reprlib.repr(data.dataset)}: it must be a name")
    are_texts = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    check(are_texts, f"class_names are {reprlib.repr(names)}: they must be texts")
    classes = config.num_classes if isinstance(model, Classifier) else 0
    check(len(names) == classes, f"class_names are {len(names)}: the model has {classes} classes")
    if isinstance(model, ImageClassifier) and (tokens := model.class_tokens) is not None:
        known = not tokens.is_floating_point() and bool(((tokens >= 0) & (tokens < config.vocab_size)).all())
        check(known, f"class_tokens are not ids under vocab_size ({config.vocab_size})")
        shape = tuple(tokens.shape)
        has_mask = model.class_mask is not None and model.class_mask.shape == shape
        fits = has_mask and len(shape) == 3 and shape[-1] <= config.max_text_len
        check(fits, f"class_tokens are {shape}: they must be 3D, no longer than {config.max_text_len}, as class_mask")


def check_finite(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raises `UserError` where a weight of the file at `path` is not a finite number."""
    for name, weight in state.items():
        if not weight.isfinite().all():
            raise UserError(f"checkpoint {path} is damaged: {name} holds values that are no finite numbers")


def _head(kind: object) -> type[Head]:
    if not isinstance(kind, str) or kind not in HEADS:
        raise ValueError(f"head is {kind!r}: it must be one of {', '.join(HEADS)}")
    return HEADS[kind]


def load_model(path: str | Path) -> Head:
    """The model in a file such as `cifar10_model.pth`, in evaluation mode, on the CPU."""
    return load_model_file(path).model
