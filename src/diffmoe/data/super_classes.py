"""Super-classes: the classes of a set in groups of alike ones, by what their pictures look like.

Shapes: C classes, G groups, P values of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data.splits import Split

OF_A_CLASS = 100
"""Training pictures that a class's mean is taken of, at most."""


def super_classes(split: Split, classes_of_part: Sequence[int], num_groups: int) -> Tensor:
    """The group of each class, int64 (C,), from 0 to G - 1; each has one class or more.

    Of several sets each is one group or more: a further group goes to the set with most pictures a group, so that
    groups have about equally many. The classes of a set, or of all sets where these are more than the groups, are split
    by what their mean pictures look like (`alike`). Mobile V-MoEs (arXiv 2309.04354) group by what a trained dense
    model takes for one another: that needs such a model.

    Args:
        split: the training split.
        classes_of_part: how many classes each of the sets has that it was made of; of one set, all C.
        num_groups: G.

    Raises:
        UserError: where there are fewer classes than groups.
    """
    num_classes = sum(classes_of_part)
    if num_classes < num_groups:
        raise UserError(
            f"num_general_experts is {num_groups}: with router_guidance_weight each needs a class of its own, and "
            f"there are {num_classes} classes"
        )
    means_CP = _mean_pictures(split, num_classes)
    if len(classes_of_part) > num_groups:
        return alike(means_CP, num_groups)
    pictures = split.labels.bincount(minlength=num_classes).split(list(classes_of_part))
    groups_of_part = [1] * len(classes_of_part)
    while sum(groups_of_part) < num_groups:
        has_more = [part for part, count in enumerate(classes_of_part) if groups_of_part[part] < count]
        groups_of_part[max(has_more, key=lambda part: int(pictures[part].sum()) / groups_of_part[part])] += 1
    found, start = [], 0
    for means, count in zip(means_CP.split(list(classes_of_part)), groups_of_part, strict=True):
        found.append(alike(means, count) + start)
        start += count
    return torch.cat(found)


def alike(means: Tensor, num_groups: int) -> Tensor:
    """Rows (C, P) into groups of near ones, equally many rows in each or one more: the group of each row, int64 (C,).

    Divisive: the rows are cut in two across the direction in which they differ most, each half by itself again
    (principal direction divisive partitioning, Boley 1998; cut by number, as experts should have equal loads).
    """
    found = torch.zeros(len(means), dtype=torch.int64)
    if num_groups == 1:
        return found
    left = num_groups // 2
    order = _principal(means).argsort(stable=True)
    cut = len(means) * left // num_groups
    low, high = order[:cut], order[cut:]
    found[low] = alike(means[low], left)
    found[high] = alike(means[high], num_groups - left) + left
    return found


def _principal(means: Tensor) -> Tensor:
    """(C, P) -> (C,), each row's place along the direction in which they differ most; its sign is of the rows alone."""
    centred = means - means.mean(0)
    place = torch.linalg.eigh((centred @ centred.T).double()).eigenvectors[:, -1]
    return place * place[place.abs().argmax()].sign()


def _mean_pictures(split: Split, num_classes: int) -> Tensor:
    """The mean of each class's first training pictures, float32 (C, P)."""
    means = []
    for label in range(num_classes):
        rows = (split.labels == label).nonzero().flatten()[:OF_A_CLASS]
        means.append(split.images[rows].flatten(1).float().sum(0) / max(1, len(rows)))
    return torch.stack(means)
