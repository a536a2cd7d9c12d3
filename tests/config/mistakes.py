"""What an impossible value must be answered with."""

from __future__ import annotations

from typing import Any

import pytest

from diffmoe.config import UserError


def check_told(config: type, name: str, value: Any, right: str) -> None:
    """One line that names the field, what it was and what would be right, by the regular expression `right`."""
    with pytest.raises(UserError, match=right) as caught:
        config(**{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}: ")
    assert "\n" not in str(caught.value)
