"""`diffmoe predict`: classes of pictures, and what a text beside them changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmoe import Predictor, load_model

Cli = Callable[..., Any]


class TestPredict:
    def test_json(self, cli, trained, drawn):
        result = cli("predict", "--checkpoint", trained.model, "--json", "--top", 3, *drawn)
        assert (result.code, result.err) == (0, "")
        found = json.loads(result.out)
        assert [entry["image"] for entry in found] == [str(path) for path in drawn]
        for entry in found:
            probabilities = [row["probability"] for row in entry["predictions"]]
            assert len(probabilities) == 3
            assert probabilities == sorted(probabilities, reverse=True)
            assert probabilities[-1] > 0
            assert sum(probabilities) <= 1
            assert {row["class"] for row in entry["predictions"]} <= set("0123456789")

    def test_table_says_the_same(self, cli, trained, drawn):
        argv = ["predict", "--checkpoint", trained.model, *drawn]
        rows = [row for entry in json.loads(cli(*argv, "--json").out) for row in entry["predictions"]]
        lines = cli(*argv).out.splitlines()
        assert [line for line in lines if not line.startswith(" ")] == [str(path) for path in drawn]
        words = [line.split()[:2] for line in lines if line.startswith(" ")]
        assert words == [[f"{row['probability']:.1%}", row["class"]] for row in rows]

    def test_all_classes_sum_to_one(self, cli, trained, drawn):
        (entry,) = json.loads(cli("predict", "--checkpoint", trained.model, "--json", "--top", 99, drawn[0]).out)
        assert len(entry["predictions"]) == 10
        assert sum(row["probability"] for row in entry["predictions"]) == pytest.approx(1)

    def test_is_averaged_over_views_where_asked_for(self, cli, trained, drawn):
        argv = ["predict", "--checkpoint", trained.model, "--json", drawn[0]]
        plain, averaged = (json.loads(cli(*argv, *more).out) for more in ((), ("--tta", "flip")))
        expected = Predictor(trained.model, "cpu").classify(drawn[0], tta="flip")
        assert averaged == expected != plain
        assert cli(*argv, "--tta", "many").code == 2

    def test_a_picture_does_not_depend_on_its_neighbours(self, cli, trained, drawn):
        argv = ["predict", "--checkpoint", trained.model, "--json"]
        together = json.loads(cli(*argv, *drawn).out)
        for path, entry in zip(drawn, together, strict=True):
            (alone,) = json.loads(cli(*argv, path).out)
            assert [row["class"] for row in alone["predictions"]] == [row["class"] for row in entry["predictions"]]

    @pytest.mark.parametrize("bad", ["missing.png", "corrupt.png", "half.jpg", "."])
    def test_a_bad_picture_among_good_ones_is_named(self, cli, trained, drawn, bad):
        path = drawn[0].parent / bad
        result = cli("predict", "--checkpoint", trained.model, drawn[0], path, drawn[1])
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"diffmoe: error: {path}")
        assert len(result.err.splitlines()) == 1

    def test_home_in_a_checkpoints_name(self, cli, trained, drawn, monkeypatch):
        monkeypatch.setenv("HOME", str(trained.save_dir))
        expected = cli("predict", "--checkpoint", trained.model, drawn[0])
        assert cli("predict", f"--checkpoint=~/{trained.model.name}", drawn[0]) == expected
        assert load_model(f"~/{trained.model.name}").config == load_model(trained.model).config


def test_predict_weighs_a_text_with_the_picture(captioned: Any, trained: Any, cli: Cli) -> None:
    flags = ("--device", "cpu", "--json")
    matched = cli("predict", captioned.pictures[0], "--checkpoint", captioned.model, "--text", "a red circle", *flags)
    assert matched.code == 0, matched.err
    assert json.loads(matched.out)[0].keys() == {"image", "log_probability", "similarity"}
    classified = cli(
        "predict", captioned.pictures[0], "--checkpoint", trained.model, "--text", "the number one", *flags
    )
    assert classified.code == 0, classified.err
    (row,) = json.loads(classified.out)
    alone, both = (
        {found["class"]: found["probability"] for found in row[name]} for name in ("predictions", "with_text")
    )
    assert alone != both


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{picture}",), "has no classes: diffmoe caption writes captions; predict needs --text"),
        (("{picture}", "--text", "a", "--top", "0"), "top is 0: it must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    captioned: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"{picture}": captioned.pictures[0], "{folder}": captioned.folder}
    result = cli("predict", *(names.get(word, word) for word in words), "--checkpoint", captioned.model)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_a_captioner_cannot_write_is_named(captioned: Any, cli: Cli) -> None:
    """Its probability is 0; left out, it would make the rest look likelier."""
    said = "a red zeppelin, a floccinaucinihilipilification, a zeppelin"  # the second is of many tokens
    flags = ("--checkpoint", captioned.model, "--text", said, "--device", "cpu")
    (row,) = json.loads(cli("predict", captioned.pictures[0], *flags, "--json").out)
    assert row["log_probability"] is None
    assert row["cannot_write"] == ["zeppelin", ",", "floccinaucinihilipilification"]
    assert -1 <= row["similarity"] <= 1
    told = cli("predict", captioned.pictures[0], *flags).out
    assert f"  log-probability: none, as this model cannot write {', '.join(row['cannot_write'])}\n" in told
