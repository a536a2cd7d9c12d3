"""`compare` refuses in one line, before any data is read, what is no comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--seeds 0", "seeds is 0: it must be at least 1"),
        ("--jobs 0", "jobs is 0: it must be at least 1"),
        ("--arms moe", "there must be at least 2 to compare"),
        ("--arms moe dens", "unknown arm 'dens' (did you mean 'dense'?)"),
        ("--arms moe a:epochs=2", "arms moe and a are not alike: epochs is"),
        ("--match time", "invalid choice: 'time'"),
        ("--epochs 0", "epochs is 0: it must be at least 1"),
        ("--epoch 3", "unknown flag --epoch (did you mean 'epochs'?)"),
        ("--resume", "resume is not for compare: the same command goes on"),
        ("--patience 3", "patience is 3: it must be 0 in a comparison"),
        ("--dataset nowhere", "dataset is 'nowhere'"),
        ("--dataset shapes --preset tiny --arms moe cnn", "arm cnn tells classes apart: shapes has captions"),
        ("--checkpoint a.pth", "checkpoint is for test"),
        ("--save_dir file", "cannot be written"),
        ("--output_dir file", "cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = cli("compare", *words.split())
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert says in result.err
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
