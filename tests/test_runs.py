"""What a run leaves on disk: complete, in the promised form, and nobody else's."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffmoe import runs
from diffmoe import training as loop
from diffmoe.commands import classification, training
from diffmoe.config import RunConfig
from diffmoe.files import write_atomically
from diffmoe.runs import RunFiles

TRAINING_KEYS = {
    *("dataset", "mode", "seed", "epochs", "steps", "images_per_second", "train_seconds"),
    *("parameters_total", "parameters_active", "val_accuracy"),
}


def read_metrics(save_dir: Path) -> dict[str, Any]:
    return json.loads((save_dir / "digits" / "metrics.json").read_text())


def read_events(folder: Path) -> Any:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0})
    return events.Reload()


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve's steps and values."""
    events = read_events(folder)
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


class TestMetrics:
    def test_training_writes_the_promised_keys(self, trained):
        metrics = read_metrics(trained.save_dir)
        assert metrics.keys() >= TRAINING_KEYS
        assert (metrics["dataset"], metrics["mode"], metrics["seed"]) == ("digits", "train", 0)
        assert (metrics["epochs"], metrics["steps"]) == (2, 10)  # 269 pictures in batches of 64: 5 steps an epoch
        assert metrics["images_per_second"] == pytest.approx(2 * 269 / metrics["train_seconds"], rel=1e-4)
        assert 0 < metrics["parameters_active"] < metrics["parameters_total"]
        assert 0 <= metrics["val_accuracy"] <= 1

    def test_testing_adds_to_them(self, cli, own_run, tmp_path):
        before = read_metrics(own_run.save_dir)
        assert cli("test", "--save_dir", own_run.save_dir, "--output_dir", tmp_path / "pictures").code == 0
        metrics = read_metrics(own_run.save_dir)
        assert {"test_accuracy", "zero_shot_accuracy"} <= metrics.keys() - before.keys()
        assert {key: metrics[key] for key in before if key != "mode"} == {k: before[k] for k in before if k != "mode"}
        assert metrics["mode"] == "test"
        assert not any(isinstance(value, dict) for value in metrics.values())  # flat
        names = {"confusion_matrix", "predictions", "calibration", "per_class", "training_curves"}
        assert {path.name for path in (tmp_path / "pictures" / "digits").iterdir()} == {f"{n}.png" for n in names}

    def test_update_keeps_what_is_there(self, tmp_path):
        files = RunFiles("digits", str(tmp_path))
        files.update_metrics({"a": 1, "b": 2})
        files.update_metrics({"b": 3, "c": "日"})
        assert json.loads(files.metrics.read_text(encoding="utf-8")) == {"a": 1, "b": 3, "c": "日"}


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

    def test_a_run_writes_a_row_for_each_epoch(self, trained):
        rows = list(csv.DictReader((trained.save_dir / "digits" / "history.csv").read_text().splitlines()))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        best = max(float(row["val_accuracy"]) for row in rows)
        assert read_metrics(trained.save_dir)["val_accuracy"] == pytest.approx(best, abs=1e-6)


class TestTensorBoard:
    def test_has_the_historys_curves(self, trained):
        scalars = read_scalars(trained.save_dir / "digits")
        rows = list(csv.DictReader((trained.save_dir / "digits" / "history.csv").read_text().splitlines()))
        assert scalars.keys() == rows[0].keys() - {"epoch", "step"}
        for name, points in scalars.items():
            assert points == [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-6)) for row in rows]

    def test_histograms_are_the_experts_load_of_the_history(self, trained):
        events = read_events(trained.save_dir / "digits")
        tags = {name for name in events.Tags()["histograms"] if name.startswith("expert_load/")}
        assert tags == {"expert_load/image_0", "expert_load/text_0"}
        rows = RunFiles("digits", str(trained.save_dir)).read_history()
        for tag in tags:
            for event, row in zip(events.Histograms(tag), rows, strict=True):
                assert event.step == row["step"]
                counts = dict(zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True))
                num_experts = sum(name.startswith(f"{tag}/") for name in row)
                found = [counts.get(expert + 0.5, 0) / event.histogram_value.num for expert in range(num_experts)]
                assert found == pytest.approx([row[f"{tag}/{expert}"] for expert in range(num_experts)], abs=1e-6)
                assert sum(found) == pytest.approx(1)

    def test_has_the_routing_maps_of_the_same_pictures_at_every_epoch(self, trained):
        first, last = read_events(trained.save_dir / "digits").Images("routing_maps")
        assert (first.step, last.step) == (5, 10)
        pictures = [Image.open(io.BytesIO(event.encoded_image_string)) for event in (first, last)]
        side = 4 * 32  # 4 x 4 patches, 32 dots each
        assert {picture.size for picture in pictures} == {(2 * side, 4 * side)}  # 4 pictures, each beside its map
        assert len({picture.crop((0, 0, side, 4 * side)).tobytes() for picture in pictures}) == 1
        assert len({picture.tobytes() for picture in pictures}) == 2

    def test_a_dense_model_has_no_experts_to_show(self, cli, tiny_flags, tmp_path):
        flags = ("--preset", "tiny-dense", *tiny_flags, "--epochs", 1, "--save_dir", tmp_path)
        assert cli("train", *flags).code == 0
        tags = read_events(tmp_path / "digits").Tags()
        assert not tags["histograms"]
        assert not tags["images"]
        assert not any(name.startswith(("expert_load", "router_entropy")) for name in tags["scalars"])

    @pytest.mark.parametrize(
        ("owner", "name"),
        [(training, "save_run"), (RunFiles, "write_history"), (RunFiles, "update_metrics")],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_shows_a_resumed_run_once(self, cli, trained, tmp_path, monkeypatch, owner, name):
        """A run that died as it saved an epoch, or told of it: the epoch is run, or told of, again."""
        original, calls = getattr(owner, name), []

        def die_the_second_time(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            original(*args)

        flags = [*trained.flags, "--save_dir", tmp_path]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die_the_second_time)
            with pytest.raises(KeyboardInterrupt):
                commands_train(flags)
        assert cli("train", *flags, "--resume").code == 0
        found, expected = (read_scalars(folder / "digits") for folder in (tmp_path, trained.save_dir))
        assert found["val_accuracy"] == expected["val_accuracy"]
        assert [step for step, _ in found["train_loss"]] == [5, 10]


def commands_train(flags: list[Any]) -> None:
    """Train below the command line, which makes an exit code of what is raised."""
    from diffmoe.settings import parse_settings

    training.train(parse_settings([str(flag) for flag in flags], mode="train"), classification.prepare)


class TestOverwriting:
    def test_is_refused_unless_told(self, cli, own_run, snapshot):
        before = snapshot(own_run.save_dir)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir)
        assert result.code == 2
        assert result.err == (
            f"diffmoe: error: {own_run.model} is an earlier run's: give --resume, --overwrite or another --save_dir\n"
        )
        assert snapshot(own_run.save_dir) == before

    @pytest.mark.parametrize("left", ["digits_model.pth", "digits/last.ckpt", "digits/metrics.json"])
    def test_is_refused_whatever_is_left_of_the_run(self, cli, own_run, snapshot, left):
        for path in own_run.save_dir.rglob("*"):
            if path.is_file() and path != own_run.save_dir / left:
                path.unlink()
        before = snapshot(own_run.save_dir)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir)
        assert result.code == 2
        assert str(own_run.save_dir / left) in result.err
        assert snapshot(own_run.save_dir) == before

    def test_replaces_the_run_and_nothing_else(self, cli, own_run):
        foreign = [own_run.save_dir / name for name in ("cifar10_model.pth", "notes.txt", "digits/notes.txt")]
        for path in foreign:
            path.write_text("mine")
        old_events = next(own_run.save_dir.glob("digits/events.*"))
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--overwrite", "--seed", 1)
        assert result.code == 0
        assert [path.read_text() for path in foreign] == ["mine"] * 3
        assert not old_events.exists()
        assert read_metrics(own_run.save_dir)["seed"] == 1

    @pytest.mark.parametrize(
        ("flag", "value", "message"),
        [
            ("--crop_padding", 8, "crop_padding is 8"),  # as wide as the pictures
            ("--num_classes", 3, "num_classes is 3"),
            ("--in_channels", 2, "in_channels is 2"),
            ("--dataset", "nowhere", "dataset is 'nowhere'"),
        ],
    )
    def test_a_mistake_costs_nobody_the_earlier_run(self, cli, own_run, snapshot, flag, value, message):
        before = snapshot(own_run.save_dir)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--overwrite", flag, value)
        assert result.code == 2
        assert message in result.err
        assert snapshot(own_run.save_dir) == before

    def test_a_folder_in_the_place_of_a_file_is_one_line(self, cli, tiny_flags, tmp_path, snapshot):
        (tmp_path / "digits" / "last.ckpt").mkdir(parents=True)
        before = snapshot(tmp_path)
        result = cli("train", *tiny_flags, "--save_dir", tmp_path, "--overwrite")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"{tmp_path / 'digits' / 'last.ckpt'} is a folder" in result.err
        assert snapshot(tmp_path) == before


ONE_EPOCH = ("--epochs", 1, "--seed", 1)


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

    @pytest.mark.parametrize("dense", [(), ("--preset", "tiny-dense")], ids=["moe", "dense"])
    def test_a_run_that_diverges_leaves_the_earlier_one(self, cli, own_run, snapshot, dense):
        before = snapshot(own_run.save_dir)
        flags = [*own_run.flags, *dense, "--save_dir", own_run.save_dir, "--overwrite"]
        result = cli("train", *flags, "--lr", 1e12)
        assert result.code == 2
        assert result.err.count("\n") == 1
        assert snapshot(own_run.save_dir) == before
        assert cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume").code == 0

    def test_a_run_that_diverges_does_not_block_the_next(self, cli, tiny_flags, tmp_path):
        flags = [*tiny_flags, *ONE_EPOCH, "--save_dir", tmp_path]
        assert cli("train", *flags, "--lr", 1e12).code == 2
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
        assert cli("train", *flags).code == 0

    def test_a_run_that_dies_before_its_first_epoch_ends_leaves_the_earlier_one(
        self, cli, own_run, snapshot, monkeypatch
    ):
        before = snapshot(own_run.save_dir)

        def die(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "_validate", die)
        assert cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--overwrite").code == 130
        assert snapshot(own_run.save_dir) == before

    def test_a_run_stopped_in_its_first_epoch_is_whole(self, cli, own_run, monkeypatch):
        before = own_run.model.read_bytes()
        train_step = loop.train_step

        def stop(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*args)

        flags = [*own_run.flags, *ONE_EPOCH, "--save_dir", own_run.save_dir]
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", stop)
            assert cli("train", *flags, "--overwrite").code == 143
        assert own_run.model.read_bytes() != before
        assert {path.name for path in (own_run.save_dir / "digits").iterdir()} == {"last.ckpt"}
        where = ("--save_dir", own_run.save_dir, "--output_dir", own_run.save_dir.parent / "pictures")
        assert cli("test", *own_run.flags, *where).code == 0
        assert cli("train", *flags, "--resume").code == 0
        assert read_metrics(own_run.save_dir)["epochs"] == 1

    def test_nothing_is_inherited(self, cli, own_run):
        files = RunFiles("digits", str(own_run.save_dir))
        files.update_metrics({"test_accuracy": 0.75, "colour": "red"})
        assert cli("train", *own_run.flags, *ONE_EPOCH, "--save_dir", own_run.save_dir, "--overwrite").code == 0
        assert not {"test_accuracy", "colour"} & read_metrics(own_run.save_dir).keys()
        assert len(files.read_history()) == 1
        assert [step for step, _ in read_scalars(files.folder)["train_loss"]] == [5]
        assert not (files.folder / ".new").exists()

    def test_a_closed_terminal_costs_nothing_that_was_trained(self, cli, own_run, monkeypatch):
        def fail(*_: Any, **__: Any) -> None:
            raise BrokenPipeError

        flags = [*own_run.flags, *ONE_EPOCH, "--save_dir", own_run.save_dir]
        with monkeypatch.context() as patch:
            patch.setattr(RunFiles, "write_history", fail)
            patch.setattr(runs, "print", fail, raising=False)
            with pytest.raises(BrokenPipeError):
                cli("train", *flags, "--overwrite")
        assert cli("train", *flags, "--resume").code == 0
        metrics = read_metrics(own_run.save_dir)
        assert (metrics["seed"], metrics["epochs"]) == (1, 1)
        assert len(RunFiles("digits", str(own_run.save_dir)).read_history()) == 1

    @pytest.mark.parametrize("next_command", ["test", "train"])
    def test_killed_between_the_model_and_the_checkpoint(self, cli, own_run, next_command):
        """By SIGKILL, as the new model is in place and the new last.ckpt is not."""
        old_model, old_last = own_run.model.read_bytes(), (own_run.save_dir / "digits" / "last.ckpt").read_bytes()
        flags = [*own_run.flags, *ONE_EPOCH, "--save_dir", own_run.save_dir]
        argv = [str(flag) for flag in ("train", *flags, "--overwrite")]
        done = subprocess.run([sys.executable, "-c", KILL_BETWEEN, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert own_run.model.read_bytes() != old_model
        assert (own_run.save_dir / "digits" / "last.ckpt").read_bytes() == old_last
        if next_command == "test":
            pictures = own_run.save_dir.parent / "pictures"
            tested = cli("test", *own_run.flags, "--save_dir", own_run.save_dir, "--output_dir", pictures)
            assert tested.code == 0
            assert "epochs" not in read_metrics(own_run.save_dir)  # those were the earlier run's
        former = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume")
        assert former.code == 2
        assert "but was 1 in" in former.err
        assert cli("train", *flags, "--resume").code == 0
        assert read_metrics(own_run.save_dir)["seed"] == 1


def replace_by_new(files: RunFiles) -> None:
    with files.replacing() as staged:
        for path in (staged.model, staged.last):
            write_atomically(path, lambda unfinished: unfinished.write_text("new"))


KILL_BETWEEN = """
import os, signal, sys
from pathlib import Path
from diffmoe.cli import main

replace = Path.replace

def die(path, target):
    if Path(target).name == "last.ckpt" and ".new" not in Path(target).parts:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)

Path.replace = die
sys.exit(main())
"""


class TestDataFolder:
    """Nothing is written where it would be read as data."""

    @pytest.fixture
    def flowers(self, tmp_path: Path) -> Path:
        """A set of two classes."""
        for kind, shade in (("rose", 60), ("tulip", 200)):
            folder = tmp_path / "flowers" / "train" / kind
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new("L", (8, 8), shade + number).save(folder / f"{number}.png")
        return tmp_path / "flowers"

    FLAGS = ("--img_size", 8, "--patch_size", 4, "--preset", "tiny", "--epochs", 1)

    @pytest.mark.parametrize(
        ("words", "flag"),
        [
            (("--dataset", "flowers", "--save_dir", "."), "save_dir"),
            (("--dataset", "flowers", "--save_dir", "flowers/train"), "save_dir"),
            (("--dataset", "{folder}", "--save_dir", "linked"), "save_dir"),
            (("--dataset", "flowers", "--data_dir", ".", "--save_dir", "."), "save_dir"),
            (("--dataset", "plants", "--data_dir", "flowers", "--save_dir", "flowers"), "save_dir"),
            (("--dataset", "flowers", "--output_dir", "."), "output_dir"),
            (("--dataset", "flowers", "--output_dir", "linked/flowers/train"), "output_dir"),
        ],
    )
    def test_is_refused_before_work_begins(self, cli, tiny_flags, flowers, monkeypatch, snapshot, words, flag):
        monkeypatch.chdir(flowers.parent)
        Path("linked").symlink_to(flowers.parent)
        before = snapshot(flowers)
        named = [word.replace("{folder}", str(flowers)) for word in words]
        result = cli("train_test", *tiny_flags, *self.FLAGS, *named)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert result.err.startswith(f"diffmoe: error: {flag} leads to ")
        assert snapshot(flowers) == before
        other = {"save_dir": "checkpoints", "output_dir": "visualizations"}[flag]
        assert result.err.endswith(f"such as --{flag} {flowers}_{other}\n")

    def test_what_is_proposed_is_right(self, cli, tiny_flags, flowers, monkeypatch, snapshot):
        monkeypatch.chdir(flowers.parent)
        before = snapshot(flowers)
        where = ("--save_dir", f"{flowers}_checkpoints", "--output_dir", f"{flowers}_visualizations")
        assert cli("train_test", *tiny_flags, *self.FLAGS, "--dataset", "flowers", *where).code == 0
        assert snapshot(flowers) == before
        model = ("--checkpoint", f"{flowers}_checkpoints/flowers_model.pth")
        for argv in (
            ("visualize", *model, "--dataset", "flowers"),
            ("retrieve", "flowers", *model, "--text", "a rose"),
            ("profile", *model, "--dataset", "flowers"),
        ):
            result = cli(*argv, "--output_dir", ".")
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert result.err.startswith("diffmoe: error: output_dir leads to flowers, in flowers, the folder of the")
            assert snapshot(flowers) == before

    def test_a_made_set_has_no_folder(self, cli, tiny_flags, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert cli("train", *tiny_flags, "--epochs", 1, "--save_dir", ".").code == 0
        assert cli("train", *tiny_flags, "--epochs", 1, "--save_dir", ".", "--resume").code == 0


def test_names_come_from_the_last_part_of_a_path(tmp_path):
    files = RunFiles("some/where/pets/", str(tmp_path))
    assert files.model == tmp_path / "pets_model.pth"
    assert files.last == tmp_path / "pets" / "last.ckpt"
