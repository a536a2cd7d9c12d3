"""Alike classes are one group, groups are of equal size, and sets stay apart where they can."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data.splits import Split
from diffmoe.data.super_classes import alike, super_classes


def plain(shades: list[int], each: int | list[int] = 2) -> Split:
    """Pictures of one shade a class, shuffled: `each` of a class, or as many as its place in the list says."""
    counts = each if isinstance(each, list) else [each] * len(shades)
    labels = torch.arange(len(shades)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.tensor(shades, dtype=torch.uint8)[labels][:, None, None, None].expand(-1, 1, 2, 2)
    return Split(images, labels)


def partition(groups: Tensor) -> set[frozenset[int]]:
    """The groups, whatever their numbers."""
    return {frozenset((groups == group).nonzero().flatten().tolist()) for group in groups.unique()}


@pytest.mark.parametrize("order", list(itertools.permutations([10, 12, 200, 205])))
def test_two_pairs_of_alike_classes_are_found(order: tuple[int, ...]) -> None:
    groups = super_classes(plain(list(order)), [4], 2)
    dark = frozenset(label for label, shade in enumerate(order) if shade < 100)
    assert partition(groups) == {dark, frozenset(range(4)) - dark}


def test_three_pairs_are_found() -> None:
    assert partition(super_classes(plain([10, 100, 200, 205, 11, 104]), [6], 3)) == {
        frozenset({0, 4}),
        frozenset({1, 5}),
        frozenset({2, 3}),
    }


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(1, 30), data=st.data(), seed=st.integers(0, 1000))
def test_groups_are_all_used_and_of_equal_size(classes: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, classes))
    rows = torch.randn(classes, 5, generator=torch.Generator().manual_seed(seed))
    sizes = alike(rows, count).bincount(minlength=count)
    assert len(sizes) == count
    assert sizes.max() - sizes.min() <= 1


def test_groups_do_not_depend_on_the_pictures_order() -> None:
    split = plain([10, 100, 200, 205, 11, 104])
    again = split.subset(torch.arange(len(split)).flip(0))
    assert torch.equal(super_classes(split, [6], 3), super_classes(again, [6], 3))


def test_each_of_several_sets_is_one_group_or_more() -> None:
    # The second set's classes look like the first's: that does not bring them together.
    split = plain([10, 200, 10, 200, 11, 201])
    assert super_classes(split, [2, 4], 2).tolist() == [0, 0, 1, 1, 1, 1]
    groups = super_classes(split, [2, 4], 3)  # a further one goes to the set with more pictures
    assert partition(groups) == {frozenset({0, 1}), frozenset({2, 4}), frozenset({3, 5})}
    # Of few classes but most pictures: as many groups as it has classes, and no more.
    many = plain([10, 200, 10, 200, 11, 201], [50, 50, 1, 1, 1, 1])
    assert partition(super_classes(many, [2, 4], 4)) == {
        *(frozenset({0}), frozenset({1}), frozenset({2, 4}), frozenset({3, 5})),
    }


def test_more_sets_than_groups_are_grouped_by_what_they_look_like() -> None:
    assert partition(super_classes(plain([10, 200, 12, 205]), [1, 1, 2], 2)) == {frozenset({0, 2}), frozenset({1, 3})}


def test_fewer_classes_than_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"num_general_experts is 3: .* there are 2 classes"):
        super_classes(plain([10, 200]), [2], 3)
