"""`diffmoe predict`: classes of pictures, and what a text beside them changes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffmoe import Predictor, load_model
from diffmoe.data.pictures import PictureSpec

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

    @pytest.mark.parametrize("bad", ["missing.png", "corrupt.png", "half.jpg"])
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


class TestManyPictures:
    """Folders and patterns: what is found is read as far as it can be."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Seven pictures, one of them in a folder, one damaged; and a text."""
        draw = np.random.default_rng(0)
        for name in ("b/f.png", "a.png", "c.jpg", "d.png", "e.png", 'é,"g".png'):
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (9, 9), dtype=np.uint8)).save(path)
        (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
        (tmp_path / "photos" / "notes.txt").write_text("no picture", "utf-8")
        return tmp_path / "photos"

    def ask(self, cli: Cli, trained: Any, *words: object) -> Any:
        return cli("predict", "--checkpoint", trained.model, "--device", "cpu", *words)

    @pytest.mark.parametrize("batch", [2, 500])
    def test_all_of_a_folder_as_one_by_one(
        self,
        cli: Cli,
        trained: Any,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        batch: int,
    ) -> None:
        monkeypatch.setattr(PictureSpec, "evaluation_batch", batch)
        result = self.ask(cli, trained, folder, "--json")
        rows = json.loads(result.out)
        names = [Path(row["image"]).relative_to(folder).as_posix() for row in rows]
        assert names == ["a.png", "bad.png", "c.jpg", "d.png", "e.png", 'é,"g".png', "b/f.png"]
        assert result.code == 0
        assert "1 of 7 pictures cannot be read" in caplog.text
        (bad,) = [row for row in rows if "error" in row]
        assert bad.keys() == {"image", "error"}
        assert "bad.png is not a picture" in bad["error"]
        used = Predictor(trained.model, "cpu")
        for row in rows:
            if row is not bad:
                (alone,) = used.classify(row["image"])
                assert [one["class"] for one in row["predictions"]] == [one["class"] for one in alone["predictions"]]
                assert row["predictions"][0]["probability"] == pytest.approx(alone["predictions"][0]["probability"])
        assert f"{folder / 'bad.png'} is not a picture" in self.ask(cli, trained, folder).out

    def test_patterns_are_expanded_and_found_pictures_come_once(
        self, cli: Cli, trained: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        (folder / "[x].png").write_bytes((folder / "a.png").read_bytes())
        words = ("a.png", "**/[a-f].png", "a.png", "*", "[x].png")
        rows = json.loads(self.ask(cli, trained, *words, "--json").out)
        found = ["a.png", "b/f.png", "d.png", "e.png"]
        assert [row["image"] for row in rows][:5] == [*found, "a.png"]
        assert [row["image"] for row in rows][5:] == ["[x].png", "bad.png", "c.jpg", 'é,"g".png', "[x].png"]

    def test_a_table_holds_what_is_printed_and_says_who_is_unsure(
        self, cli: Cli, trained: Any, folder: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "new" / "answers.csv"
        rows = json.loads(self.ask(cli, trained, folder, "--json", "--top", 2).out)
        limit = sorted(row["predictions"][0]["probability"] for row in rows if "error" not in row)[3]
        flags = ("--csv", file, "--top", 2, "--threshold", limit)
        result = self.ask(cli, trained, folder, *flags)
        assert result.code == 0
        assert f"{file}: 7 pictures; " in result.out
        assert "unsure 3" in result.out
        assert "unreadable 1" in result.out
        with file.open(newline="", encoding="utf-8-sig") as opened:
            table = list(csv.DictReader(opened))
        assert list(table[0]) == ["image", "class", "probability", "class_2", "probability_2", "unsure", "error"]
        assert [row["image"] for row in table] == [row["image"] for row in rows]
        for line, row in zip(table, rows, strict=True):
            best = row["predictions"][0] if "error" not in row else {"class": "", "probability": ""}
            assert (line["class"], line["probability"]) == (best["class"], str(best["probability"]))
            assert line["unsure"] == ("" if "error" in row else str(best["probability"] < limit))
            assert line["error"] == row.get("error", "")
        again = self.ask(cli, trained, folder, *flags)
        assert (again.code, again.err.count("\n")) == (2, 1)
        assert f"{file} is there already: give --overwrite" in again.err
        before = file.read_bytes()
        assert self.ask(cli, trained, folder, *flags, "--overwrite").code == 0
        assert file.read_bytes() == before

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("{folder}/*.gif",), "*.gif fits no picture"),
            (("{folder}/empty",), "empty is a folder without pictures"),
            (("{folder}/bad*",), "bad.png is not a picture"),
            (("{folder}", "--threshold", "1.5"), "threshold is 1.5: it must be from 0 to 1"),
            (("{folder}", "--csv", "{folder}"), "it must be a file, not a folder"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, cli: Cli, trained: Any, folder: Path, words: tuple[str, ...], message: str
    ) -> None:
        (folder / "empty").mkdir()
        result = self.ask(cli, trained, *(word.replace("{folder}", str(folder)) for word in words))
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert message in result.err

    def test_no_threshold_without_classes(self, cli: Cli, captioned: Any) -> None:
        words = ("predict", captioned.pictures[0], "--checkpoint", captioned.model, "--text", "a", "--threshold", 0.5)
        result = cli(*words)
        assert result.code == 2
        assert "threshold is 0.5: it is of the probability of a class" in result.err


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
