"""A user's mistake: the nearest name, and a check that says what would be right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from diffmoe.config.errors import (
    LONGEST_MESSAGE,
    UserError,
    check,
    check_at_least,
    check_fraction,
    check_limits,
    expanded,
    nearest,
)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("top_kk", "top_k"),
        ("top-k", "top_k"),
        ("batch", "batch_size"),  # the only one that begins so
        ("weight_decy", "weight_decay"),
        ("dgo", "dog"),
        ("weight", None),  # two begin so
        ("class_weights", None),  # its letters are in switch_loss_weight, in their order: another thing altogether
        ("zzz", None),
    ],
)
def test_nearest_is_really_near(name, meant):
    known = ["lr", "top_k", "batch_size", "weight_decay", "weight_norm", "switch_loss_weight", "dog"]
    assert nearest(name, known) == (f" (did you mean '{meant}'?)" if meant else "")


def test_a_check_names_the_first_field_that_fails():
    config = SimpleNamespace(a=1, b=-1, c=-2)
    with pytest.raises(UserError, match=r"^b is -1: it must be at least 0$"):
        check_at_least(config, 0, "a", "b", "c")
    with pytest.raises(UserError, match=r"^a is 1: it must be from 0 up to, but not including, 1$"):
        check_fraction(config, "a")
    with pytest.raises(UserError, match=r"^name is 'x': it must be y$"):
        check(False, "name", "x", "y")


def test_the_bounds_themselves_are_allowed():
    config = SimpleNamespace(a=0, b=0.999)
    check_at_least(config, 0, "a")
    check_fraction(config, "a", "b")


def test_it_is_no_other_mistake():
    assert issubclass(UserError, ValueError)  # Python's users catch it as one


def test_it_is_one_line_that_does_nothing_to_a_terminal():
    """Names of files and of classes come from anywhere."""
    assert str(UserError("a\nb\x1b[2J\u202e\udcff\u2028 is wrong")) == r"a\nb\x1b[2J\u202e\udcff\u2028 is wrong"
    for text in ("a 'b' \\ is wrong", "日本\u3000語 é 🦊"):
        assert str(UserError(text)) == text


def test_a_long_one_keeps_what_is_wrong_and_what_would_be_right():
    text = str(UserError(f"a is {'x' * 5000}: it must be b"))
    assert len(text) < LONGEST_MESSAGE + 10
    assert text.startswith("a is xxx")
    assert text.endswith("xxx: it must be b")


@dataclass(frozen=True)
class Numbers:
    count: int = 1
    rate: float = 0.5
    name: str = "x"
    on: bool = True
    where: str | None = None


def test_a_number_has_a_limit_of_its_own_or_that_of_all():
    check_limits(Numbers(count=1_000_000, rate=5.0), rate=5)
    for wrong, message in (
        (Numbers(count=1_000_001), "count is 1000001: it must be at most 1,000,000"),
        (Numbers(rate=math.inf), "rate is inf: it must be at most 5"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            check_limits(wrong, rate=5)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("x" * 256, "256 bytes"),
        ("é" * 128, "256 bytes"),
        ("a/" * 2048, "4,096 bytes"),
        ("a\0", "NUL"),
        ("a\ud800", "half"),
    ],
)
def test_what_no_file_can_be_called_is_no_path(path, why):
    with pytest.raises(UserError, match=f"is no path: .*{why}"):
        expanded(path)


def test_a_path_may_be_as_long_as_a_system_takes_it():
    for path in ("x" * 255, "/".join(["x" * 255] * 15), "a\udcff"):  # a name that is no UTF-8, as Python has it
        assert expanded(path) == path
