"""`diffmoe visualize`, and what else finds a set by the name in a model file: the user's own is never mistaken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--preset", "tiny", "--img_size", 8, "--patch_size", 4, "--in_channels", 1, "--epochs", 1, "--device", "cpu")


@pytest.mark.parametrize("place", ["data_dir", "dataset"])
def test_a_set_called_as_a_built_in_one_is_not_replaced_by_it(
    cli: Any, tiny_flags: list[str], flowers: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(flowers.parent)
    flowers.rename("digits")
    where = ("--dataset", "digits", "--data_dir", ".") if place == "data_dir" else ("--dataset", "./digits")
    assert cli("train", *tiny_flags, *FLAGS, *where).code == 0
    model = ("--checkpoint", "checkpoints/digits_model.pth")
    for argv in (
        ("visualize", *model),
        ("test", *model),
        ("profile", *model),
        ("visualize", *model, "--dataset", "digits"),
    ):
        result = cli(*argv)
        assert (result.code, result.out) == (2, "")
        assert result.err == (
            "diffmoe: error: checkpoints/digits_model.pth was trained on a set of your own called digits, not on the "
            "one that the program brings: say where yours is, with --data_dir DIR or --dataset DIR/digits\n"
        )
        assert not Path("visualizations").exists()
    assert cli("test", *model, *where).code == 0
