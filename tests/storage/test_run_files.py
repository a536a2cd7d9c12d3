"""What a run leaves on disk: complete, in the promised form, and of one run alone."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diffmoe.config import RunConfig, UserError
from diffmoe.files import write_atomically
from diffmoe.storage.run_files import RunFiles


def test_names_come_from_the_last_part_of_a_path(tmp_path):
    files = RunFiles("some/where/pets/", str(tmp_path))
    assert files.model == tmp_path / "pets_model.pth"
    assert files.last == tmp_path / "pets" / "last.ckpt"


def test_those_beside_a_model_file(tmp_path):
    for path in (tmp_path / "pets_model.pth", str(tmp_path / "pets.pth")):
        assert RunFiles.beside(path).history == tmp_path / "pets" / "history.csv"


class TestMetrics:
    def test_update_keeps_what_is_there(self, tmp_path):
        files = RunFiles("digits", str(tmp_path))
        files.update_metrics({"a": 1, "b": 2})
        files.update_metrics({"b": 3, "c": "日"})
        assert json.loads(files.metrics.read_text(encoding="utf-8")) == {"a": 1, "b": 3, "c": "日"}
        assert files.read_metrics() == {"a": 1, "b": 3, "c": "日"}

    def test_none_takes_a_name_away(self, tmp_path):
        files = RunFiles("digits", str(tmp_path))
        files.update_metrics({"a": 1, "b": 0})
        files.update_metrics({"a": None, "c": None})
        assert json.loads(files.metrics.read_text()) == {"b": 0}

    def test_none_is_no_metrics(self, tmp_path):
        assert RunFiles("digits", str(tmp_path)).read_metrics() == {}

    @pytest.mark.parametrize(("text", "says"), [('{"half": ', "is not valid JSON"), ("[1]", "is not a JSON object")])
    def test_a_damaged_file_is_one_line_that_names_it(self, tmp_path, text, says):
        files = RunFiles("digits", str(tmp_path))
        files.folder.mkdir()
        files.metrics.write_text(text)
        with pytest.raises(UserError, match=rf"metrics\.json {says}: mend or remove it"):
            files.update_metrics({"a": 1})
        assert files.metrics.read_text() == text


class TestHistory:
    ROWS = ({"epoch": 1, "loss": 1 / 3, "accuracy": 0.1}, {"epoch": 2, "loss": 1e-300, "accuracy": math.pi})

    def test_round_trip_is_exact(self, tmp_path):
        files = RunFiles("digits", str(tmp_path))
        files.write_history(self.ROWS)
        assert files.read_history() == list(self.ROWS)
        assert [list(row) for row in files.read_history()] == [list(row) for row in self.ROWS]

    def test_rows_of_an_earlier_version_have_nan_where_a_figure_is_new(self, tmp_path):
        files = RunFiles("digits", str(tmp_path))
        files.write_history([{"epoch": 1.0}, {"epoch": 2.0, "load": 0.5}])
        first, second = files.read_history()
        assert math.isnan(first["load"])
        assert second == {"epoch": 2.0, "load": 0.5}

    def test_none_is_no_rows(self, tmp_path):
        assert RunFiles("digits", str(tmp_path)).read_history() == []


class Killed(BaseException):
    """Stands in for SIGKILL: no line after it changes a file."""


def kill_at(monkeypatch: pytest.MonkeyPatch, folder: Path, call: int) -> list[str]:
    """From the `call`-th change on, counted from 1, nothing in `folder` changes any more. Returns the changes made."""
    made: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(path: Path, *args: Any, **kwargs: Any) -> Any:
            if Path(path).is_relative_to(folder):
                if len(made) + 1 >= call:
                    raise Killed
                made.append(f"{name} {path}")
            return original(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    for name in ("replace", "unlink", "mkdir", "write_text"):
        wrap(Path, name)
    wrap(shutil, "rmtree")
    return made


class TestReplacing:
    """Whatever moment a run dies at, there is a whole earlier run or a whole new one."""

    def test_killed_at_any_moment_it_is_the_one_or_the_other(self, monkeypatch, tmp_path):
        outcomes: list[set[str]] = []
        for call in range(1, 100):
            files = RunFiles("digits", str(tmp_path / str(call)))
            events = files.folder / "events.out.tfevents.1"
            old = (files.model, files.last, files.metrics, files.history, events)
            for path in old:
                write_atomically(path, lambda unfinished: unfinished.write_text("old"))
            with monkeypatch.context() as patch:
                made = kill_at(patch, files.model.parent, call)
                with suppress(Killed):
                    replace_by_new(files)
                    break
            files.check(RunConfig(overwrite=True))
            found = {path.read_text() for path in (files.model, files.last)}
            assert len(found) == 1, made  # never a model of one with the last.ckpt of another
            assert [path.exists() for path in old[2:]] == [found == {"old"}] * 3, made
            assert not list(files.folder.glob(".new/**/last.ckpt"))
            outcomes.append(found)
        assert outcomes[0] == {"old"}
        assert outcomes[-1] == {"new"}
        assert len(outcomes) > 10

    def test_what_cannot_be_written_leaves_the_earlier_run(self, tmp_path, snapshot):
        files = RunFiles("digits", str(tmp_path))
        for path in (files.model, files.last, files.metrics):
            write_atomically(path, lambda unfinished: unfinished.write_text("old"))
        before = snapshot(tmp_path)
        with suppress(ZeroDivisionError), files.replacing() as staged:
            write_atomically(staged.model, lambda unfinished: unfinished.write_text("new"))
            write_atomically(staged.last, lambda unfinished: unfinished.write_text(str(1 / 0)))
        assert snapshot(tmp_path) == before


def replace_by_new(files: RunFiles) -> None:
    with files.replacing() as staged:
        for path in (staged.model, staged.last):
            write_atomically(path, lambda unfinished: unfinished.write_text("new"))


@pytest.mark.parametrize("name", ["digits_model.pth", "digits/last.ckpt", "digits/metrics.json", "digits/history.csv"])
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_where_a_file_is_written_is_said_to_be_one(tmp_path, name, flags):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{name} is a folder: training writes a file there"):
        RunFiles("digits", str(tmp_path)).check(RunConfig(**flags))


def test_a_name_that_leaves_no_room_for_the_files_is_one_line(tmp_path):
    RunFiles("x" * 200, str(tmp_path)).check(RunConfig())
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        RunFiles("x" * 250, str(tmp_path)).check(RunConfig())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["a,b\n1,x\n", "a\n1,2\n", "a,b\n1\n", "a\n\udcff\n"])
def test_a_damaged_history_is_one_line(tmp_path, text):
    files = RunFiles("digits", str(tmp_path))
    files.folder.mkdir()
    files.history.write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(UserError, match=r"history\.csv is not a table of numbers: mend or remove it"):
        files.read_history()


def test_metrics_that_are_nested_without_end_are_one_line(tmp_path):
    files = RunFiles("digits", str(tmp_path))
    files.folder.mkdir()
    files.metrics.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"metrics\.json is not valid JSON"):
        files.read_metrics()
