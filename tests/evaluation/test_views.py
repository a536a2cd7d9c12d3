"""The views of a picture, and that what is said of them is averaged."""

from __future__ import annotations

import pytest
import torch

from diffmoe.config import UserError
from diffmoe.evaluation.views import views

PICTURE = torch.arange(12.0).view(1, 1, 3, 4)  # 0 1 2 3 / 4 5 6 7 / 8 9 10 11


def test_views_by_hand() -> None:
    assert [view.tolist() for view in views(PICTURE, "none")] == [PICTURE.tolist()]
    mirror = [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]
    assert [view[0, 0].tolist() for view in views(PICTURE, "flip")] == [PICTURE[0, 0].tolist(), mirror]
    found = [view[0, 0].tolist() for view in views(PICTURE, "flip_shift")]
    # Reflected by a pixel, the rows are 1 0 1 2 and the columns 1 0 1 2 3 2: the windows at the corners.
    up_left = [[5, 6, 7, 6], [9, 10, 11, 10], [5, 6, 7, 6]]
    down_right = [[5, 4, 5, 6], [1, 0, 1, 2], [5, 4, 5, 6]]
    shifted = [view for one in (up_left, down_right) for view in (one, [row[::-1] for row in one])]
    assert found == [PICTURE[0, 0].tolist(), mirror, *shifted]


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(UserError, match="tta is 'flop': it must be one of none, flip, flip_shift"):
        list(views(PICTURE, "flop"))
