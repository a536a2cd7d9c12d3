"""What the classes look like, in English sentences: several for each, the same number for all classes of a set.

They describe what can be seen, as CLIP's captions do, and each fits in 32 CLIP tokens. They are the text that the
classes are told apart by; no description is ever tied to a picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from diffmoe.config import dataset_name
from diffmoe.config.recipes import config_dir, read_yaml

TEMPLATES = (
    "a photo of {a} {name}.",
    "a picture that shows {a} {name}.",
    "a close-up photo of {a} {name}.",
    "a small, blurry photo of {a} {name}.",
    "{a} {name} in the middle of the picture.",
    "one example of {a} {name}, seen clearly.",
)
"""For sets without descriptions of their own."""


@cache
def described_sets() -> dict[str, dict[str, list[str]]]:
    """The sets with descriptions of their own (`configs/descriptions.yaml`), their classes, and the sentences."""
    return read_yaml(config_dir() / "descriptions.yaml")


def class_descriptions(dataset: str, class_names: Sequence[str]) -> list[list[str]]:
    """For each class, in order, its sentences; equally many for all classes, at least 5.

    `dataset` is a name, a path or a hub name. A set of one of the three known names with other classes than theirs
    is described by the templates, as any other set.
    """
    described = {_plain(name): sentences for name, sentences in described_sets().get(dataset_name(dataset), {}).items()}
    if all(_plain(name) in described for name in class_names):
        return [list(described[_plain(name)]) for name in class_names]
    return [_fill_templates(name) for name in class_names]


def _plain(name: str) -> str:
    """Copies of a set differ in how they write a name: `T - shirt / top`, `T-shirt/top`."""
    return re.sub(r"[\W_]+", "", name).lower()


def _fill_templates(class_name: str) -> list[str]:
    name = " ".join(class_name.replace("_", " ").split())
    article = "an" if re.match(r"[aeiou]", name, re.IGNORECASE) else "a"
    return [template.format(a=article, name=name) for template in TEMPLATES]
