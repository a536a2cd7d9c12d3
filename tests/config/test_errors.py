"""A user's mistake: the nearest name, and a check that says what would be right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from diffmoe.config.errors import UserError, check, check_at_least, check_at_most, check_fraction, nearest


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
    with pytest.raises(UserError, match=r"^a is 1: it must be at most 0$"):
        check_at_most(config, 0, "b", "a")
    with pytest.raises(UserError, match=r"^a is 1: it must be from 0 up to, but not including, 1$"):
        check_fraction(config, "a")
    with pytest.raises(UserError, match=r"^name is 'x': it must be y$"):
        check(False, "name", "x", "y")


def test_the_bounds_themselves_are_allowed():
    config = SimpleNamespace(a=0, b=0.999)
    check_at_least(config, 0, "a")
    check_at_most(config, 0, "a")
    check_fraction(config, "a", "b")


def test_it_is_no_other_mistake():
    assert issubclass(UserError, ValueError)  # Python's users catch it as one


def test_it_is_one_line_that_does_nothing_to_a_terminal():
    """Names of files and of classes come from anywhere."""
    assert str(UserError("a\nb\x1b[2J\u202e\udcff\u2028 is wrong")) == r"a\nb\x1b[2J\u202e\udcff\u2028 is wrong"
    for text in ("a 'b' \\ is wrong", "日本\u3000語 é 🦊"):
        assert str(UserError(text)) == text
