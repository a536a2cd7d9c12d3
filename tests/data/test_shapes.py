"""Drawn scenes: every caption is true of its own, nothing held out is met in training, pixels show what is said."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffmoe.config import DataConfig
from diffmoe.data import shapes
from diffmoe.data.loading import load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.shapes import COLOURS, HELD_OUT, KINDS, PLACES, SIZES, Scene, Shape, captions_of, is_true, num_true
from diffmoe.data.sources import check_dataset

ONE = Scene((Shape("circle", "red", "small", "top left"),), 100)
TWO = Scene((Shape("circle", "red", "small", "top left"), Shape("square", "blue", "large", "top right")), 100)


def other(value: str, values: object) -> str:
    return next(choice for choice in list(values) if choice != value)  # type: ignore[call-overload]


@pytest.mark.parametrize("split", shapes.SPLIT_SIZES)
def test_five_captions_all_different_and_all_true(split: str) -> None:
    for scene in shapes.scenes(split):
        captions = captions_of(scene)
        assert len(set(captions)) == 5
        for caption in captions:
            assert all(is_true(caption, scene).values()), (caption, scene)


def test_a_caption_is_false_of_a_scene_that_differs_in_what_it_says() -> None:
    for scene in shapes.scenes("test")[300:400]:
        for number, shape in enumerate(scene.shapes):
            for name, part, values in (("kind", "shape", KINDS), ("colour", "colour", COLOURS)):
                changed = dataclasses.replace(shape, **{name: other(getattr(shape, name), values)})
                others = tuple(changed if n == number else s for n, s in enumerate(scene.shapes))
                if len({(s.kind, s.colour) for s in others}) == len(others):
                    for caption in captions_of(scene):
                        assert not is_true(caption, dataclasses.replace(scene, shapes=others))[part]


@pytest.mark.parametrize(
    ("caption", "scene", "wrong"),
    [
        ("a small red circle in the top left", ONE, set()),
        ("a red circle in the top right", ONE, {"place"}),
        ("a large red circle in the top left", ONE, {"size"}),
        ("a blue circle in the top left", ONE, {"colour"}),
        ("a red square in the top left", ONE, {"shape"}),
        ("a red circle", ONE, {"place"}),  # a place must be named
        ("", ONE, {"colour", "shape", "place", "size", "relation"}),
        ("a red circle in the top left", TWO, {"colour", "shape", "place", "size", "relation"}),  # one is missing
        ("a blue square in the top right and a red circle in the top left", TWO, set()),  # in any order
        ("a red square in the top left and a blue circle in the top right", TWO, {"shape"}),  # bound to the wrong one
        ("in the top left is a red circle left of a blue square in the top right", TWO, set()),
        ("in the top left is a red circle right of a blue square in the top right", TWO, {"relation"}),
        ("in the top right is a blue square right of a red circle in the top left", TWO, set()),
    ],
)
def test_what_is_wrong_is_told_apart(caption: str, scene: Scene, wrong: set[str]) -> None:
    assert {part for part, right in is_true(caption, scene).items() if not right} == wrong


def test_what_is_held_out_comes_in_test_only_and_is_a_quarter_of_it() -> None:
    for split in ("train", "validation"):
        pairs = {(shape.colour, shape.kind) for scene in shapes.scenes(split) for shape in scene.shapes}
        assert pairs.isdisjoint(HELD_OUT)
        assert len(pairs) == len(COLOURS) * len(KINDS) - len(HELD_OUT)
    test = shapes.scenes("test")
    assert sum(scene.is_held_out for scene in test) == len(test) / 4


def test_no_scene_is_in_two_splits_and_they_are_always_the_same() -> None:
    found = [shapes.scenes(split) for split in shapes.SPLIT_SIZES]
    assert [len(scenes) for scenes in found] == list(shapes.SPLIT_SIZES.values())
    assert len(set().union(*found)) == sum(map(len, found))
    assert shapes.scenes("validation") == found[1]
    with pytest.raises(ValueError, match="split is 'tset': it must be one of train, validation, test"):
        shapes.scenes("tset")


@pytest.mark.parametrize("img_size", [32, 56])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_named_colour_is_at_the_named_place_and_nowhere_else(kind: str, size: str, img_size: int) -> None:
    for colour, rgb in COLOURS.items():
        for place, (x, y) in PLACES.items():
            picture = shapes.draw(Scene((Shape(kind, colour, size, place),), 100), PictureSpec(img_size, 3))
            assert picture[:, int(y * img_size), int(x * img_size)].tolist() == list(rgb)
            is_shape = (picture != 100).any(0)
            rows, columns = (is_shape.any(axis).nonzero().flatten().float() for axis in (1, 0))
            middle = [(columns.mean() + 0.5) / img_size, (rows.mean() + 0.5) / img_size]
            assert middle == pytest.approx([x, y], abs=1.5 / img_size)
            assert len(columns) / img_size == pytest.approx(2 * SIZES[size], abs=2.5 / img_size)


def test_the_achievable_recall_counts_every_scene_that_fits() -> None:
    same_look = dataclasses.replace(ONE, background=90)
    bigger = dataclasses.replace(ONE, shapes=(dataclasses.replace(ONE.shapes[0], size="large"),))
    gallery = [ONE, same_look, bigger, TWO]
    captions = ["a red circle in the top left", "a small red circle in the top left", captions_of(TWO)[0], "a dog"]
    assert num_true(captions, gallery).tolist() == [3, 2, 1, 0]


def test_the_set_is_the_drawn_scenes() -> None:
    config = DataConfig(dataset="shapes")
    assert check_dataset(config) == "captions"
    data = load_dataset(config, PictureSpec(16, 1))
    assert len(data.train) == 4000
    scenes = shapes.scenes("test")
    assert data.test.captions == tuple(map(captions_of, scenes))
    assert isinstance(data.test.images, torch.Tensor)
    assert torch.equal(data.test.images[5], shapes.draw(scenes[5], PictureSpec(16, 1)))
    assert data.test.held_out is not None
    assert data.test.held_out.tolist() == [scene.is_held_out for scene in scenes]
