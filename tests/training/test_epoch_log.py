"""What is told of each epoch: metrics in the promised form, a history, curves and pictures for TensorBoard."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.training.events import read_events, read_scalars

from diffmoe.config.settings import parse_settings
from diffmoe.runs import train_run
from diffmoe.storage.model_files import load_model_file
from diffmoe.storage.run_files import RunFiles
from diffmoe.training import saving

TRAINING_KEYS = {
    *("dataset", "mode", "seed", "epochs", "steps", "images_per_second", "train_seconds"),
    *("parameters_total", "parameters_active", "val_accuracy"),
}


def read_metrics(save_dir: Path) -> dict[str, Any]:
    return json.loads((save_dir / "digits" / "metrics.json").read_text())


class TestMetrics:
    def test_training_writes_the_promised_keys(self, trained):
        metrics = read_metrics(trained.save_dir)
        assert metrics.keys() >= TRAINING_KEYS
        assert (metrics["dataset"], metrics["mode"], metrics["seed"]) == ("digits", "train", 0)
        assert (metrics["epochs"], metrics["steps"]) == (2, 10)  # 269 pictures in batches of 64: 5 steps an epoch
        assert metrics["images_per_second"] == pytest.approx(2 * 269 / metrics["train_seconds"], rel=1e-4)
        assert 0 < metrics["parameters_active"] < metrics["parameters_total"]
        assert 0 <= metrics["val_accuracy"] <= 1

    def test_a_run_writes_a_row_for_each_epoch(self, trained):
        rows = list(csv.DictReader((trained.save_dir / "digits" / "history.csv").read_text().splitlines()))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        best = max(float(row["val_accuracy"]) for row in rows)
        assert read_metrics(trained.save_dir)["val_accuracy"] == pytest.approx(best, abs=1e-6)

    def test_the_model_file_has_the_temperature_of_its_epoch(self, trained):
        rows = list(csv.DictReader((trained.save_dir / "digits" / "history.csv").read_text().splitlines()))
        kept = max(rows, key=lambda row: float(row["val_accuracy"]))
        assert load_model_file(trained.model).temperature == pytest.approx(float(kept["temperature"]), rel=1e-6)


class TestTensorBoard:
    def test_has_the_historys_curves(self, trained):
        scalars = read_scalars(trained.save_dir / "digits")
        rows = list(csv.DictReader((trained.save_dir / "digits" / "history.csv").read_text().splitlines()))
        assert scalars.keys() == rows[0].keys() - {"epoch", "step"}
        for name, points in scalars.items():
            known = [(int(row["step"]), float(row[name])) for row in rows if row[name] != "nan"]
            assert points == [(step, pytest.approx(value, rel=1e-6)) for step, value in known]
            assert len(known) == len(rows) - name.startswith("flutter/")  # nothing has changed before the second epoch

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
        [(saving, "save_run"), (RunFiles, "write_history"), (RunFiles, "update_metrics")],
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
                train_run(parse_settings([str(flag) for flag in flags], mode="train"))  # below the command's exit codes
        assert cli("train", *flags, "--resume").code == 0
        found, expected = (read_scalars(folder / "digits") for folder in (tmp_path, trained.save_dir))
        assert found["val_accuracy"] == expected["val_accuracy"]
        assert [step for step, _ in found["train_loss"]] == [5, 10]
