"""The YAML files that come with the program: model sizes (`configs/presets.yaml`) and one recipe a dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from diffmoe.config import (
    EMBEDDED_DATASETS,
    HUB_DATASETS,
    GenerationConfig,
    UserError,
    dataset_name,
    nearest,
    set_names,
)

LARGEST_YAML = 1_000_000
"""In characters; a file of settings has some hundreds."""


def config_dir() -> Path:
    """The folder of recipes: inside the installed package, or at the root of a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def read_yaml(path: Path) -> dict[str, Any]:
    """A flat YAML mapping. Raises `UserError` naming the file where it is missing or is not one."""
    text = _read_text(path)
    try:
        loaded = yaml.safe_load(text)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deep: it must be a mapping such as 'lr: 0.001'") from error
    except Exception as error:  # besides its own the library lets those of Python through: `!!int x`, 2024-99-99
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must be a mapping such as 'lr: 0.001', not {type(loaded).__name__}")
    return loaded


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_YAML + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if len(text) > LARGEST_YAML:
        raise UserError(f"{path} has over {LARGEST_YAML:,} characters: it must be a file of settings")
    return text


def presets() -> dict[str, dict[str, Any]]:
    """The model presets by name; every size comes with a `-dense` variant, and `dense` is `base-dense`."""
    sizes = read_yaml(config_dir() / "presets.yaml")
    dense = {f"{name}-dense": {**fields, "dense": True} for name, fields in sizes.items()}
    return {**sizes, **dense, "dense": dense["base-dense"]}


def recipe(dataset: str, preset: str | None = None) -> dict[str, Any]:
    """The fields that differ from the defaults for a dataset and a preset (None: the dataset's own).

    A recipe file holds the dataset's fields, `preset`, and under `presets` what goes with one preset there
    (its epochs, its learning rate). Several sets at once use `configs/several.yaml`, unknown ones
    `configs/folder.yaml`.
    """
    unknown = "several" if len(set_names(dataset)) > 1 else "folder"
    name = dataset_name(dataset) if dataset in (*EMBEDDED_DATASETS, *HUB_DATASETS) else unknown
    fields = read_yaml(config_dir() / f"{name}.yaml")
    by_preset = fields.pop("presets", {})
    default_preset = fields.pop("preset", "base")
    name = default_preset if preset is None else preset
    known = presets()
    if name not in known:
        raise UserError(f"preset is {name!r}: it must be one of {', '.join(known)}{nearest(name, known)}")
    size = "base" if name == "dense" else name.removesuffix("-dense")
    return {**known[name], **fields, **by_preset.get(size, {})}


def generation_config(dataset: str) -> GenerationConfig:
    """How captions of a dataset's model are written, as its recipe says."""
    known = {field.name for field in dataclasses.fields(GenerationConfig)}
    return GenerationConfig(**{name: value for name, value in recipe(dataset).items() if name in known})
