"""`diffmoe caption`: sentences printed, saved and drawn, and nobody's files overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffmoe.commands.caption import OUTPUT_DIR

Cli = Callable[..., Any]


def test_captions_are_printed_saved_and_drawn(captioned: Any, cli: Cli, tmp_path: Path) -> None:
    asked = captioned.pictures[:3]
    flags = ("--checkpoint", captioned.model, "--output_dir", tmp_path, "--device", "cpu")
    result = cli("caption", *asked, *flags, "--decoding", "greedy", "--json")
    assert result.code == 0, result.err
    written = json.loads(result.out)
    assert [row["image"] for row in written] == list(map(str, asked))
    assert json.loads((tmp_path / "captions.json").read_text()) == written
    with Image.open(tmp_path / "captions.png") as sheet:
        assert sheet.size[0] > 100
    sampled = [
        cli("caption", asked[0], *flags, "--decoding", "sample", "--seed", seed).out for seed in ("1", "1", "2", "3")
    ]
    assert sampled[0] == sampled[1]
    assert len(set(sampled)) > 1


def test_json_is_for_other_programs_and_leaves_nothing_behind(
    captioned: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("caption", captioned.pictures[0], "--checkpoint", captioned.model, "--device", "cpu")
    told = json.loads(cli(*flags, "--json").out)
    assert list(tmp_path.iterdir()) == []
    assert cli(*flags).code == 0
    assert json.loads((tmp_path / OUTPUT_DIR / "captions.json").read_text()) == told


FOREIGN = {
    "captions.json": '[{"image": "a.png", "caption": "mine"}]',  # its keys, not in its layout
    "captions.png": "a picture of mine",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_not_overwritten(captioned: Any, cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FOREIGN[name])
    where = ("--checkpoint", captioned.model, "--output_dir", tmp_path, "--device", "cpu")
    flags = ("caption", captioned.pictures[0], *where)
    result = cli(*flags)
    assert result.code == 2
    assert result.err == (
        f"diffmoe: error: {tmp_path / name} is not one that this program wrote: "
        "give another --output_dir or --overwrite\n"
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: FOREIGN[name]}
    assert cli(*flags, "--overwrite").code == 0
    assert cli(*flags).code == 0  # what it wrote itself it replaces


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{picture}", "--beems", "3"), "unknown flag --beems (did you mean 'beams'?)"),
        (("{picture}", "--beams", "0"), "beams is 0: it must be at least 1"),
        (("{picture}", "--decoding", "best"), "decoding is 'best'"),
        (("--decoding", "{picture}"), "decoding is '{picture}': it must be one of 'greedy', 'beam', 'sample'"),
        (("{picture}", "--chekpoint", "a"), "unknown flag --chekpoint (did you mean 'checkpoint'?)"),
        (("nowhere.png",), "nowhere.png"),
        ((), "the following arguments are required: IMAGE"),
    ],
)
def test_a_mistake_is_one_line(
    captioned: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"{picture}": captioned.pictures[0], "{folder}": captioned.folder}
    result = cli("caption", *(names.get(word, word) for word in words), "--checkpoint", captioned.model)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message.replace("{picture}", str(captioned.pictures[0])) in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_flag_takes_the_word_behind_it_wherever_it_stands(captioned: Any, cli: Cli, place: int) -> None:
    pictures = [str(path) for path in captioned.pictures[:2]]
    flags = ["--checkpoint", captioned.model, "--device", "cpu", "--json"]
    words = [*pictures, *flags]
    expected = json.loads(cli("caption", *words, "--decoding", "greedy").out)
    result = cli("caption", *words[:place], "--decoding", "greedy", *words[place:])
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == expected
    assert [row["image"] for row in expected] == pictures


def test_home_in_a_pictures_name(captioned: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(captioned.folder))
    flags = ("--checkpoint", captioned.model, "--device", "cpu", "--json")
    expected = json.loads(cli("caption", captioned.pictures[0], *flags).out)
    (row,) = json.loads(cli("caption", f"~/{captioned.pictures[0].name}", *flags).out)
    assert row["caption"] == expected[0]["caption"]
