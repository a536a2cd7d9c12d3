"""A comparison from its command to its files: what it says, that it goes on where it was killed, and at equal time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmoe.comparison import run as runs
from diffmoe.comparison.make import routing_health
from diffmoe.comparison.page import arm_table
from diffmoe.comparison.statistics import paired_difference
from diffmoe.storage.run_files import RunFiles

Cli = Callable[..., Any]


class Killed(Exception):  # noqa: N818 - it is no error
    """What a kill looks like from within."""


@pytest.fixture
def flags(tiny_flags: list[str], tmp_path: Path) -> list[Any]:
    where = ("--save_dir", tmp_path / "runs", "--output_dir", tmp_path / "seen")
    return ["compare", *tiny_flags, *where, "--epochs", 2, "--seed", 3]


def counted(monkeypatch: pytest.MonkeyPatch, fail_at: int = 0) -> list[str]:
    """The save_dirs of the runs that are trained from now on; dies instead of the one with this number."""
    trained: list[str] = []
    train = runs.train_and_test

    def watch(settings: Any) -> None:
        if len(trained) + 1 == fail_at:
            raise Killed
        trained.append(settings.run.save_dir)
        train(settings)

    monkeypatch.setattr(runs, "train_and_test", watch)
    return trained


def test_a_killed_one_goes_on_and_says_what_was_promised(
    cli: Cli, flags: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        first = counted(patch, fail_at=3)
        with pytest.raises(Killed):
            cli(*flags, "--seeds", 2)
    with monkeypatch.context() as patch:
        second = counted(patch)
        result = cli(*flags, "--seeds", 2, "--json")
    place = tmp_path / "runs" / "compare" / "digits"
    assert [*first, *second] == [str(place / arm / f"seed{seed}") for seed in (3, 4) for arm in ("moe", "dense")]
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found == json.loads((tmp_path / "seen/compare/digits/comparison.json").read_text(encoding="utf-8"))
    assert (found["dataset"], found["match"], found["seeds"]) == ("digits", "flops", [3, 4])
    assert found.keys() >= {"command", "date", "machine", "versions", "notes"}
    scores = {}
    for name, arm in found["arms"].items():
        files = [RunFiles("digits", str(place / name / f"seed{seed}")) for seed in (3, 4)]
        scores[name] = [of_run.read_metrics()["test_accuracy"] for of_run in files]
        assert arm["test_accuracy"]["values"] == scores[name]
        assert arm["test_accuracy"]["mean"] == pytest.approx(sum(scores[name]) / 2)
        assert arm["train_seconds"]["std"] >= 0
        assert arm["steps"] == [10, 10]
    moe, dense = found["arms"].values()
    assert dense["flops_per_image"] == pytest.approx(moe["flops_per_image"], rel=0.02)
    assert dense["parameters_total"] < moe["parameters_total"]
    assert dense["differs"]["dense"] is True
    assert dense["routing"] is None
    assert 0 <= moe["routing"]["min_load"] <= 1 <= moe["routing"]["max_load"] <= 8
    assert 0 <= moe["routing"]["flutter"] <= 1
    (row,) = found["differences"]
    expected = paired_difference(scores["moe"], scores["dense"])
    assert (row["a"], row["b"], row["metric"]) == ("moe", "dense", "test_accuracy")
    assert (row["mean"], row["p"]) == pytest.approx((expected.mean, expected.p))
    assert row["ci95"] == pytest.approx(expected.ci95)
    page = Path(found["page"]).read_text(encoding="utf-8")
    assert page.count("<img ") == 2
    assert all(Path(figure).is_file() for figure in found["figures"])

    with monkeypatch.context() as patch:
        third = counted(patch)
        other = cli(*flags, "--seeds", 2, "--lr", 0.01)
        again = cli(*flags, "--seeds", 2, "--lang", "zh")
        assert third == []
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert f"{place}/moe/seed3 holds a run of other settings or data: give --overwrite" in other.err
    assert again.code == 0
    assert "run 4/4: dense, seed 4: test_accuracy" in again.out
    assert "dense differs from moe in dense True (False)" in again.out
    assert "moe − dense" in again.out
    assert 'lang="zh-Hans"' in Path(found["page"]).read_text(encoding="utf-8")


def test_at_equal_time_each_has_the_first_ones_seconds(cli: Cli, flags: list[Any], tmp_path: Path) -> None:
    result = cli(*flags, "--seeds", 1, "--match", "seconds", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    moe, dense = (arm["train_seconds"]["mean"] for arm in found["arms"].values())
    assert moe <= dense < moe + 5  # the step that was under way is finished, on however busy a machine
    assert found["differences"][0]["p"] is None
    assert any("one seed tells no difference from chance" in note for note in found["notes"])


def test_views_are_averaged_where_that_is_asked_for_without_another_training(
    cli: Cli, flags: list[Any], tmp_path: Path
) -> None:
    def compared(*more: str) -> dict[str, Any]:
        result = cli(*flags, "--seeds", 1, "--json", "--arms", "dense", "moe", "by-place:router=hash", *more)
        assert (result.code, result.err) == (0, "")
        return json.loads(result.out)

    plain, averaged = compared(), compared("--tta", "flip")
    assert "test_accuracy_tta" not in json.dumps(plain)
    assert [(row["a"], row["b"]) for row in plain["differences"]] == [("dense", "moe"), ("dense", "by-place")]
    assert {row["metric"] for row in plain["differences"]} == {"test_accuracy"}
    assert {row["metric"] for row in averaged["differences"]} == {"test_accuracy", "test_accuracy_tta"}
    for name, arm in averaged["arms"].items():
        files = RunFiles("digits", str(tmp_path / "runs" / "compare" / "digits" / name / "seed3"))
        assert files.read_metrics()["train_seconds"] == plain["arms"][name]["train_seconds"]["mean"]
        assert arm["train_seconds"] == plain["arms"][name]["train_seconds"]
        assert arm["test_accuracy"] == plain["arms"][name]["test_accuracy"]
        assert 0 <= arm["test_accuracy_tta"]["mean"] <= 1


def test_the_table_has_a_column_of_views_where_some_arm_has_them() -> None:
    def told(*values: float) -> dict[str, Any]:
        return {"mean": sum(values) / len(values), "std": None, "values": [*values]}

    costs = {"flops_per_image": 1, "parameters_total": 1, "routing": None}
    times = {"train_seconds": told(1), "images_per_second": told(1)}
    arms = {"a": {"test_accuracy": told(0.5), **costs, **times}, "b": {"test_accuracy": told(0.75), **costs, **times}}
    found: dict[str, Any] = {"arms": arms, "differences": [{"metric": "test_accuracy"}]}
    assert "test accuracy, mean over views" not in arm_table(found)[0]
    arms["b"]["test_accuracy_tta"] = told(0.875)
    heads, *rows = arm_table(found)
    assert heads[:3] == ("arm", "test accuracy", "test accuracy, mean over views")
    assert [row[:3] for row in rows] == [("a", "50.00%", ""), ("b", "75.00%", "87.50%")]


def test_several_at_once_are_processes_that_tell_what_went_wrong(cli: Cli, flags: list[Any], tmp_path: Path) -> None:
    result = cli(*flags, "--seeds", 1, "--jobs", 2, "--lr", 1e30, "--clip_norm", 0)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "seed 3: the loss is nan" in result.err or "seed 3: the loss is inf" in result.err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_one_that_dies_leaves_no_process_and_loses_no_epoch(cli: Cli, flags: list[Any], tmp_path: Path) -> None:
    """Killed with -9, it can tell its processes nothing: they see it themselves, save and end."""
    words = [str(word) for word in (*flags, "--epochs", 12, "--seeds", 1, "--jobs", 2)]
    runs_of = tmp_path / "runs" / "compare" / "digits"
    with subprocess.Popen([sys.executable, "-m", "diffmoe", *words], stdout=subprocess.DEVNULL) as parent:
        waited_for(lambda: any(runs_of.glob("*/seed3/digits/last.ckpt")))
        threads = Path(f"/proc/{parent.pid}/task").glob("*/children")
        children = [child for thread in threads for child in thread.read_text("utf-8").split()]
        parent.kill()
    assert len(children) == 2
    waited_for(lambda: not any(Path("/proc", child).exists() for child in children))
    seconds = {arm: seconds_of(runs_of / arm) for arm in ("moe", "dense")}
    assert any(seconds.values())
    result = cli(*words)
    assert (result.code, result.err) == (0, "")
    for arm, before in seconds.items():
        assert seconds_of(runs_of / arm)[: len(before)] == before
        assert len(seconds_of(runs_of / arm)) == 12


def seconds_of(arm: Path) -> list[float]:
    """At the end of each epoch: no two trainings have the same."""
    files = RunFiles("digits", str(arm / "seed3"))
    return [row["seconds"] for row in files.read_history()]


def waited_for(is_so: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_health_is_the_worst_load_and_the_mean_flutter() -> None:
    rows = [{"min_load": 0.5, "max_load": 1.5, "flutter": 0.2}, {"min_load": 0.8, "max_load": 2.0}]
    assert routing_health(rows) == {"min_load": 0.5, "max_load": 2, "flutter": 0.2}
    assert routing_health([]) is None
