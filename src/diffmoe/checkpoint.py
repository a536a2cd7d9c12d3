"""Saving and loading a model file that stands alone.

A model file is a dict of tensors, numbers and strings that `torch.load(weights_only=True)` opens: a pickle with code
in it is refused.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffmoe.config import ModelConfig, UserError
from diffmoe.files import write_atomically
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier

MODEL_FORMAT = "diffmoe-model-1"

Head = ImageClassifier | Captioner
HEADS = {"classifier": ImageClassifier, "captioner": Captioner}
"""What a model file calls each head; a file that says nothing holds a classifier."""


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


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model file."""

    model: Head
    data: DataInfo


def save_model(path: Path, model: Head, data: DataInfo) -> None:
    """Write a model with the config that made it and what it needs to know of its data."""
    content = {
        "format": MODEL_FORMAT,
        "head": next(name for name, kind in HEADS.items() if isinstance(model, kind)),
        "model_config": dataclasses.asdict(model.config),
        "data": dataclasses.asdict(data),
        "state_dict": model.state_dict(),
    }
    write(path, content)


def write(path: Path, content: dict[str, Any]) -> None:
    """Save atomically. Through memory: torch reports a full disk as a failure of its own."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, lambda unfinished: unfinished.write_bytes(buffer.getbuffer()))


def read(path: str | Path, kind: str) -> dict[str, Any]:
    """The dict in a file that this program wrote. Raises `UserError` naming the path and what is wrong with it.

    `kind` is the format expected: `MODEL_FORMAT` for a model file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    # Only torch's zip files are ours: nothing else is unpickled at all, not even warily.
    if not zipfile.is_zipfile(path):
        raise UserError(f"checkpoint {path} is truncated or is not a checkpoint")
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


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A model file, on the CPU and in evaluation mode. Raises `UserError` naming the path and what is wrong with it."""
    content = read(path, MODEL_FORMAT)
    try:
        state: dict[str, torch.Tensor] = content["state_dict"]
        config = ModelConfig(**content["model_config"])
        data = DataInfo(**content["data"])
        model = _make_head(content.get("head", "classifier"), config, state)
        model.load_state_dict(state)
    except (TypeError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"checkpoint {path} does not fit this version: {' '.join(str(error).split())[:200]}") from error
    return Checkpoint(model.eval(), data)


def _make_head(name: str, config: ModelConfig, state: dict[str, torch.Tensor]) -> Head:
    if name == "captioner":
        return Captioner(config, state["output_tokens"])
    if name == "classifier":
        return ImageClassifier(config, state.get("class_tokens"), state.get("class_mask"))
    raise ValueError(f"head is {name!r}: it must be one of {', '.join(HEADS)}")


def load_model(path: str | Path) -> Head:
    """The model in a file such as `cifar10_model.pth`, in evaluation mode, on the CPU."""
    return load_checkpoint(path).model
