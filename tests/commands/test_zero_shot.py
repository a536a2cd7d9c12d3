"""`diffmoe zero-shot`: labels of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_zero_shot_gives_each_label_a_probability(captioned: Any, cli: Cli) -> None:
    flags = ("--checkpoint", captioned.model, "--device", "cpu", "--json")
    result = cli(
        "zero-shot", *captioned.pictures[:2], "--labels", "a circle", "cross", "--templates", "{} here", *flags
    )
    assert result.code == 0, result.err
    for row in json.loads(result.out):
        assert {found["class"] for found in row["predictions"]} == {"a circle", "cross"}
        assert sum(found["probability"] for found in row["predictions"]) == pytest.approx(1, abs=1e-5)


def test_a_label_that_is_given_twice_counts_once(captioned: Any, cli: Cli) -> None:
    flags = ("zero-shot", captioned.pictures[0], "--checkpoint", captioned.model, "--device", "cpu", "--json")
    twice, once = (json.loads(cli(*flags, "--labels", "cat", "dog", *more).out) for more in (("cat",), ()))
    assert twice == once
    assert len(once[0]["predictions"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{picture}", "--labels", "cat"), "there must be at least 2 different ones"),
        (("{picture}", "--labels", "a", "b", "--templates", "no place"), "it must contain {}"),
        (("nowhere.png", "--labels", "a", "b"), "nowhere.png"),
    ],
)
def test_a_mistake_is_one_line(
    captioned: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"{picture}": captioned.pictures[0], "{folder}": captioned.folder}
    result = cli("zero-shot", *(names.get(word, word) for word in words), "--checkpoint", captioned.model)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert list(tmp_path.iterdir()) == []
