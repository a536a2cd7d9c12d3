"""What a run leaves on disk: complete, in the promised form, and nobody else's."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffmoe.commands import classification, training
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

    def test_shows_a_resumed_run_once(self, cli, trained, tmp_path, monkeypatch):
        """A run that died after it wrote an epoch's events and before it saved: the epoch is run again."""
        save_run, calls = training.save_run, []

        def die_the_second_time(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            save_run(*args)

        flags = [*trained.flags, "--save_dir", tmp_path]
        monkeypatch.setattr(training, "save_run", die_the_second_time)
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


def test_names_come_from_the_last_part_of_a_path(tmp_path):
    files = RunFiles("some/where/pets/", str(tmp_path))
    assert files.model == tmp_path / "pets_model.pth"
    assert files.last == tmp_path / "pets" / "last.ckpt"
