"""Captioned pictures that the program draws: one or two coloured shapes, five true captions each, no download.

Everything about a scene is known, so a caption of it can be judged: what it says is right or wrong. Some pairs of
colour and kind never come in training or validation; a quarter of the test scenes have one of them.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffmoe.data.captions import CaptionSplit
from diffmoe.data.pictures import PictureSpec

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 215, 40),
    "purple": (140, 60, 170),
    "white": (250, 250, 250),
}
KINDS = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.15, "large": 0.23}
"""Half the width of a shape, over the picture's width."""
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "centre": (0.5, 0.5),
}
"""Where a shape's middle is: x and y over the picture's width and height."""
HELD_OUT = {("red", "square"), ("green", "triangle"), ("blue", "cross"), ("yellow", "circle")}
"""Pairs of colour and kind that only the test split has."""
SPLIT_SIZES = {"train": 4000, "validation": 500, "test": 1000}
HELD_OUT_SHARE = 0.25
OVERSAMPLING = 4
"""Pictures are drawn this many times as large and scaled down: smooth edges."""


@dataclass(frozen=True)
class Shape:
    """One shape of a scene."""

    kind: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two shapes in corners of the picture; one alone may be in the centre."""

    shapes: tuple[Shape, ...]
    background: int
    """Grey level, 0 to 255."""

    @property
    def relation(self) -> str | None:
        """Where the first shape is, seen from the second, when they share a row or a column; else None."""
        if len(self.shapes) < 2:
            return None
        (x1, y1), (x2, y2) = (PLACES[shape.place] for shape in self.shapes)
        if y1 == y2:
            return "left of" if x1 < x2 else "right of"
        return ("above" if y1 < y2 else "below") if x1 == x2 else None

    @property
    def is_held_out(self) -> bool:
        """Whether training has never seen one of its pairs of colour and kind."""
        return any((shape.colour, shape.kind) in HELD_OUT for shape in self.shapes)


def scenes(split: str) -> list[Scene]:
    """The scenes of a split, always the same; no scene is in two splits."""
    drawn: set[Scene] = set()
    found: list[Scene] = []
    for name, size in SPLIT_SIZES.items():
        generator = random.Random(f"shapes {name}")
        num_held_out = round(size * HELD_OUT_SHARE) if name == "test" else 0
        found = []
        while len(found) < size:
            scene = _draw_scene(generator)
            wanted = len(found) < num_held_out
            if scene.is_held_out == wanted and scene not in drawn:
                found.append(scene)
                drawn.add(scene)
        if name == split:
            return found
    raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLIT_SIZES)}")


def _draw_scene(generator: random.Random) -> Scene:
    num_shapes = generator.choice((1, 2))
    places = generator.sample(list(PLACES)[:-1], 2) if num_shapes == 2 else [generator.choice(list(PLACES))]
    looks = [(kind, colour) for kind in KINDS for colour in COLOURS]
    chosen = [
        Shape(kind, colour, generator.choice(list(SIZES)), place)
        for (kind, colour), place in zip(generator.sample(looks, num_shapes), places, strict=True)
    ]
    return Scene(tuple(chosen), generator.randrange(70, 150))


def captions_of(scene: Scene) -> tuple[str, ...]:
    """Five captions, all true, in different words; each names colour, kind and place of every shape."""
    if len(scene.shapes) == 1:
        (s,) = scene.shapes
        return (
            f"a {s.size} {s.colour} {s.kind} in the {s.place}",
            f"there is a {s.colour} {s.kind} in the {s.place}",
            f"in the {s.place} is a {s.size} {s.colour} {s.kind}",
            f"the picture shows a {s.size} {s.colour} {s.kind} in the {s.place}",
            f"the {s.place} has a {s.colour} {s.kind}",
        )
    first, second = scene.shapes
    a, b = (f"{shape.colour} {shape.kind}" for shape in scene.shapes)
    last = f"a {b} in the {second.place} and a {a} in the {first.place}"
    if scene.relation is not None:
        last = f"in the {first.place} is a {a} {scene.relation} a {b} in the {second.place}"
    return (
        f"a {first.size} {a} in the {first.place} and a {second.size} {b} in the {second.place}",
        f"there is a {a} in the {first.place} and a {b} in the {second.place}",
        f"in the {first.place} is a {a} and in the {second.place} is a {b}",
        f"the picture shows a {second.size} {b} in the {second.place} and a {first.size} {a} in the {first.place}",
        last,
    )


def draw(scene: Scene, spec: PictureSpec) -> Tensor:
    """The scene as uint8 (C, size, size)."""
    side = spec.size * OVERSAMPLING
    image = Image.new("RGB", (side, side), (scene.background,) * 3)
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        x, y = (part * side for part in PLACES[shape.place])
        half = SIZES[shape.size] * side
        left, top, right, bottom = x - half, y - half, x + half, y + half
        colour = COLOURS[shape.colour]
        if shape.kind == "circle":
            pen.ellipse((left, top, right, bottom), colour)
        elif shape.kind == "square":
            pen.rectangle((left, top, right, bottom), colour)
        elif shape.kind == "triangle":
            pen.polygon(((x, top), (right, bottom), (left, bottom)), colour)
        else:
            pen.rectangle((left, y - half / 3, right, y + half / 3), colour)
            pen.rectangle((x - half / 3, top, x + half / 3, bottom), colour)
    return spec.fit(image)


def draw_splits(spec: PictureSpec) -> dict[str, CaptionSplit]:
    """All three splits."""
    splits = {}
    for name in SPLIT_SIZES:
        drawn = scenes(name)
        images = torch.stack([draw(scene, spec) for scene in drawn])
        held_out = torch.tensor([scene.is_held_out for scene in drawn])
        splits[name] = CaptionSplit(images, tuple(map(captions_of, drawn)), held_out)
    return splits


_WORDS = {
    "relation": ("left of", "right of", "above", "below"),
    "place": PLACES,
    "size": SIZES,
    "colour": COLOURS,
    "kind": KINDS,
    "break": ("and", "has"),
}
_KIND_OF_WORD = {word: kind for kind, words in _WORDS.items() for word in words}
_WORD = re.compile("|".join(_KIND_OF_WORD))


def claims(caption: str) -> tuple[list[dict[str, str]], str | None]:
    """Read a caption: what it says of each shape it names, in order, and the relation between the first two, if any.

    Of a shape its kind, colour, size and place, by these names, where they are said. A place before a shape
    (`in the top left is a ...`) or after it (`... in the top left`) belongs to that shape.
    """
    found: list[dict[str, str]] = [{}]
    relation = None
    for word in _WORD.findall(caption):
        current = found[-1]
        kind_of_word = _KIND_OF_WORD[word]
        if kind_of_word == "relation":
            relation = word
        if kind_of_word in ("relation", "break"):
            if "kind" in current:
                found.append({})
            continue
        if kind_of_word in current:  # a second colour or place begins another shape
            found.append({})
        found[-1][kind_of_word] = word
    return [claim for claim in found if claim], relation


def is_true(caption: str, scene: Scene) -> dict[str, bool]:
    """Whether what a caption says of colour, shape, place, size and relation is right of a scene.

    Colour, shape and place are right when the caption names one for each shape of the scene and, matched to the
    shapes in the way that suits the caption best, all are right. Size and relation may be left out.
    """
    said, relation = claims(caption)
    parts = {"colour": "colour", "shape": "kind", "place": "place", "size": "size"}
    if len(said) != len(scene.shapes):
        return dict.fromkeys((*parts, "relation"), False)
    orders = [tuple(scene.shapes), tuple(reversed(scene.shapes))][: len(scene.shapes)]

    def judge(order: Sequence[Shape]) -> dict[str, bool]:
        pairs = list(zip(said, order, strict=True))
        right = {
            part: all(
                claim.get(name) == getattr(shape, name) or (part == "size" and name not in claim)
                for claim, shape in pairs
            )
            for part, name in parts.items()
        }
        ordered = dataclasses.replace(scene, shapes=tuple(order))
        return {**right, "relation": relation is None or relation == ordered.relation}

    return max(map(judge, orders), key=lambda right: sum(right.values()))


def num_true(captions: Sequence[str], gallery: Sequence[Scene]) -> Tensor:
    """For each caption the number of scenes of which all of it is true, int64 (M,).

    With n such scenes nobody could find the right one at the first try more often than one time in n.
    """
    signatures = [frozenset((s.kind, s.colour, s.place) for s in scene.shapes) for scene in gallery]
    counts = []
    for caption in captions:
        said, _ = claims(caption)
        asked = frozenset((claim.get("kind"), claim.get("colour"), claim.get("place")) for claim in said)
        candidates = (scene for scene, has in zip(gallery, signatures, strict=True) if has == asked)
        counts.append(sum(all(is_true(caption, scene).values()) for scene in candidates))
    return torch.tensor(counts)
