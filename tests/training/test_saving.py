"""Stopping anywhere and resuming ends where never stopping does; and what a run may not be resumed with."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.training.signals import Crash, crash_at, send_at
from torch import Tensor

from diffmoe.storage.run_files import RunFiles
from diffmoe.tasks.classification import Classification
from diffmoe.training import saving
from diffmoe.training.epoch_log import EpochLog
from diffmoe.training.objective import Trainee

ALL_RANDOMNESS = [
    *("--epochs", "3", "--lr", "0.003", "--batch_size", "64", "--accumulation_steps", "2", "--dropout", "0.1"),
    *("--top_k", "2", "--router_noise", "--crop_padding", "1", "--flip", "--erase", "0.3"),
    *("--dense_fraction", "0.4", "--expert_sharing", "0.3"),
]
"""269 pictures: 5 batches, 3 optimizer steps an epoch (the last one of a single ragged batch), 9 in all, 4 of them with
pools that are whole."""

FAST = [
    *("--epochs", "2", "--batch_size", "64", "--patch_embed", "whitened", "--stem_width", "8", "--optimizer", "muon"),
    *("--expert_lr_scale", "0.5", "--ema_decay", "0.8", "--alternate_flip", "--cutout", "3", "--mixup", "0.2"),
    *("--cutmix", "0.5", "--start_size", "0.5", "--dense_fraction", "0.3", "--precision", "bf16-mixed"),
]
"""What a fast recipe is made of: 5 optimizer steps an epoch, 10 in all."""

TIMES = ("seconds", "images_per_second", "train_seconds", "date", "load")


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str], isolate: Callable[[Path], Any]) -> Path:
    """The run that nobody interrupted."""
    from diffmoe.cli import main

    save_dir = tmp_path_factory.mktemp("in_one_go")
    with isolate(tmp_path_factory.mktemp("cache")):
        assert main(["train", *tiny_flags, *ALL_RANDOMNESS, "--save_dir", str(save_dir)]) == 0
    return save_dir


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list | tuple) else value


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, whatever is nested in what."""
    assert type(found) is type(expected), where
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}[{number}]")
    else:
        assert found == expected, where


def assert_same_run(found: Path, expected: Path, dataset: str = "digits") -> None:
    """Final weights, optimizer, generators, progress, best model, history and metrics are equal, times apart."""
    for name in (f"{dataset}/last.ckpt", f"{dataset}_model.pth"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (found, expected))
        assert_equal(without_times(one), without_times(other), name)
    histories = [(folder / dataset / "history.csv").read_text().splitlines() for folder in (found, expected)]
    assert_equal(*(without_times(list(csv.DictReader(lines))) for lines in histories))
    metrics = [json.loads((folder / dataset / "metrics.json").read_text()) for folder in (found, expected)]
    assert_equal(*(without_times(values) for values in metrics))


class TestExactResume:
    """Stopping anywhere and resuming ends where never stopping does."""

    @pytest.mark.parametrize(
        ("owner", "name", "calls"),
        [
            (Trainee, "step", [1]),
            (Trainee, "step", [3]),  # the last of an epoch, before its validation
            (Trainee, "step", [5]),  # in mid-epoch
            (Trainee, "step", [2, 6, 7]),  # again and again; 7 is the first of the last epoch
            (Trainee, "step", [9]),  # the very last
            (Classification, "validate", [2]),
        ],
        ids=lambda value: str(value) if isinstance(value, list) else getattr(value, "__name__", value),
    )
    def test_after_a_signal(self, monkeypatch, cli, tiny_flags, in_one_go, tmp_path, owner, name, calls):
        send_at(monkeypatch, owner, name, calls, signal.SIGTERM)
        flags = [*tiny_flags, *ALL_RANDOMNESS, "--save_dir", tmp_path]
        results = [cli("train", *flags)] + [cli("train", *flags, "--resume") for _ in calls]
        assert [result.code for result in results] == [143] * len(calls) + [0]
        last = tmp_path / "digits" / "last.ckpt"
        assert results[0].err == f"stopped by SIGTERM, saved in {last}: the same command with --resume goes on\n"
        assert_same_run(tmp_path, in_one_go)

    @pytest.mark.parametrize(
        ("owner", "name", "call"),
        [
            (Classification, "validate", 3),
            (saving, "save_run", 2),
            (saving, "save_run", 3),
            (EpochLog, "write", 1),  # saved and not told of
            (EpochLog, "write", 3),  # nothing is left to train
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_after_a_crash(self, monkeypatch, cli, tiny_flags, in_one_go, tmp_path, owner, name, call):
        flags = [*tiny_flags, *ALL_RANDOMNESS, "--save_dir", tmp_path]
        with monkeypatch.context() as patch:
            crash_at(patch, owner, name, call)
            with pytest.raises(Crash):
                cli("train", *flags)
        assert cli("train", *flags, "--resume").code == 0
        assert_same_run(tmp_path, in_one_go)

    def test_of_a_fast_recipe(self, monkeypatch, cli, tiny_flags, tmp_path):
        flags = [*tiny_flags, *FAST, "--save_dir"]
        assert cli("train", *flags, tmp_path / "whole").code == 0
        send_at(monkeypatch, Trainee, "step", [2, 5, 7], signal.SIGTERM)
        codes = [cli("train", *flags, tmp_path / "parts", *resume).code for resume in ((), *[("--resume",)] * 3)]
        assert codes == [143, 143, 143, 0]
        assert_same_run(tmp_path / "parts", tmp_path / "whole")

    def test_of_a_finished_run_changes_nothing(self, cli, own_run):
        files = ["digits_model.pth", "digits/last.ckpt", "digits/metrics.json", "digits/history.csv"]
        before = {name: (own_run.save_dir / name).read_bytes() for name in files}
        assert cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume").code == 0
        assert before == {name: (own_run.save_dir / name).read_bytes() for name in files}

    def test_of_captions(self, monkeypatch, cli, captioned, tmp_path):
        flags = ["--dataset", captioned.folder, "--save_dir", tmp_path, *captioned.flags]
        with monkeypatch.context() as patch:
            crash_at(patch, saving, "save_run", 2)
            with pytest.raises(Crash):
                cli("train", *flags)
        assert cli("train", *flags, "--resume").code == 0
        assert_same_run(tmp_path, captioned.save_dir, "drawn")


class TestMoreEpochs:
    """A run that is over, or under way, goes on for more epochs than it began with, and says what that does."""

    def test_a_finished_run_goes_on(self, cli, own_run, tmp_path):
        flags = [*own_run.flags, "--save_dir", own_run.save_dir, "--resume", "--epochs", 4]
        files = RunFiles("digits", str(own_run.save_dir))
        before = files.read_history()
        result = cli("train", *flags)
        assert (result.code, result.err) == (0, "")
        assert (
            "2 epochs become 4, 2 of which are done: the learning rate goes on where it would be by now" in result.out
        )
        after = files.read_history()
        assert len(after) == 4
        for old, new in zip(before, after, strict=False):
            assert {name: new[name] for name in old} == pytest.approx(old, nan_ok=True)
        assert cli("train", *own_run.flags, "--save_dir", tmp_path, "--epochs", 4).code == 0
        of_four = RunFiles("digits", str(tmp_path)).read_history()
        assert [row["lr"] for row in after[2:]] == [row["lr"] for row in of_four[2:]]
        assert after[2]["lr"] > before[1]["lr"]
        assert files.read_metrics()["epochs"] == 4
        assert "epochs: 4" in (own_run.save_dir / "digits" / "config.yaml").read_text("utf-8")
        again = cli("train", *flags)
        assert (again.code, "become" in again.out, len(files.read_history())) == (0, False, 4)

    def test_not_where_pools_were_split_after_a_share_of_them(self, cli, tiny_flags, tmp_path):
        flags = [*tiny_flags, "--dense_fraction", 0.5, "--save_dir", tmp_path]
        assert cli("train", *flags, "--epochs", 1).code == 0
        result = cli("train", *flags, "--epochs", 2, "--resume")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "resume: epochs is 2 but was 1" in result.err


class TestRefusal:
    """A run goes on with what it began with, or not at all."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("lr", 0.007), ("epochs", 1), ("batch_size", 32), ("embed_dim", 32), ("val_fraction", 0.4), ("seed", 3)),
            ("precision", "bf16-mixed"),
        ],
    )
    def test_with_other_settings_is_refused(self, cli, own_run, snapshot, name, value):
        before = snapshot(own_run.save_dir)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume", f"--{name}", value)
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        assert f"resume: {name} is {value!r} but was " in result.err
        assert snapshot(own_run.save_dir) == before

    def test_where_there_is_nothing_to_resume(self, cli, tiny_flags, tmp_path):
        result = cli("train", *tiny_flags, "--save_dir", tmp_path / "none", "--resume")
        assert result.code == 2
        assert result.err.startswith("diffmoe: error: resume: there is no ")
        assert not (tmp_path / "none").exists()

    def test_with_a_flipped_bit_is_refused(self, cli, own_run):
        last = own_run.save_dir / "digits" / "last.ckpt"
        content = bytearray(last.read_bytes())
        moments = next(iter(torch.load(last, weights_only=True)["optimizer"]["state"].values()))["exp_avg"]
        content[content.index(moments.numpy().tobytes())] ^= 1
        last.write_bytes(content)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert result.err.startswith(f"diffmoe: error: checkpoint {last} is damaged: ")

    @pytest.mark.parametrize(
        "damage",
        [
            *("shared", "model", "optimizer", "progress", "rng"),  # without it
            {"shared": [1]},
            {"model": {"head.weight": torch.zeros(1)}},
            {"optimizer": {}},
            {"rng": "seven"},
            {"rng": torch.zeros(1, 5, dtype=torch.uint8)},
            {"progress": {"epochs": 1}},
            *({"progress": {"epoch": value}} for value in ("2", -1, 7)),
            {"progress": {"history": 3}},
            {"progress": {"best": "high"}},
            {"progress": {"sums": {"loss": 1}}},
        ],
        ids=str,
    )
    def test_of_a_damaged_run_is_one_line(self, cli, own_run, damage):
        last = own_run.save_dir / "digits" / "last.ckpt"
        states = torch.load(last, weights_only=True)
        if isinstance(damage, str):
            del states[damage]
        elif "progress" in damage:
            states["progress"] |= damage["progress"]
        else:
            states |= damage
        torch.save(states, last)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert result.err.startswith(f"diffmoe: error: checkpoint {last} is damaged (")

    @pytest.mark.parametrize("share", [0, 0.5, 0.99])
    def test_of_a_truncated_run_is_one_line(self, cli, own_run, share):
        last = own_run.save_dir / "digits" / "last.ckpt"
        last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume")
        told = f"diffmoe: error: checkpoint {last} is truncated or is not a checkpoint\n"
        assert (result.code, result.err) == (2, told)

    def test_of_weights_that_are_no_numbers_is_one_line(self, cli, own_run):
        last = own_run.save_dir / "digits" / "last.ckpt"
        states = torch.load(last, weights_only=True)
        states["model"]["head.bias"][3] = torch.nan
        torch.save(states, last)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume")
        told = f"checkpoint {last} is damaged: head.bias holds values that are no finite numbers"
        assert (result.code, result.err) == (2, f"diffmoe: error: {told}\n")

    def test_with_another_number_of_devices_is_refused(self, cli, own_run):
        last = own_run.save_dir / "digits" / "last.ckpt"
        states = torch.load(last, weights_only=True)
        torch.save({**states, "rng": states["rng"].view(1, -1).repeat(2, 1)}, last)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume")
        assert result.code == 2
        assert result.err == f"diffmoe: error: resume: {last} was written by 2 devices, not 1\n"


def rename_a_class(flowers: Path) -> None:
    (flowers / "train" / "rose").rename(flowers / "train" / "peony")


def remove_a_picture(flowers: Path) -> None:
    (flowers / "train" / "tulip" / "3.png").unlink()


def move_a_picture(flowers: Path) -> None:
    (flowers / "train" / "tulip" / "3.png").rename(flowers / "train" / "rose" / "12.png")


def repaint_the_pictures(flowers: Path) -> None:
    for path in flowers.rglob("*.png"):
        Image.new("L", (8, 8), 33).save(path)


class TestData:
    FLAGS = ("--img_size", 8, "--patch_size", 4, "--preset", "tiny", "--epochs", 1)

    @pytest.fixture
    def flags(self, cli: Any, tiny_flags: list[str], flowers: Path, tmp_path: Path) -> list[Any]:
        """A run on flowers that was trained, without its --dataset."""
        flags = [*tiny_flags, *self.FLAGS, "--save_dir", tmp_path / "runs"]
        assert cli("train", *flags, "--dataset", flowers).code == 0
        return flags

    @pytest.mark.parametrize("change", [rename_a_class, remove_a_picture, move_a_picture, repaint_the_pictures])
    def test_that_changed_is_refused(self, cli, flags, flowers, tmp_path, snapshot, change):
        before = snapshot(tmp_path / "runs")
        change(flowers)
        result = cli("train", *flags, "--dataset", flowers, "--resume")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert result.err.startswith("diffmoe: error: resume: the data is not what the run in ")
        assert "(its classes, labels, captions or pictures differ)" in result.err
        assert snapshot(tmp_path / "runs") == before

    def test_that_was_copied_elsewhere_is_the_same(self, cli, flags, flowers, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for where in (("--dataset", "flowers"), ("--dataset", "other/flowers"), ("--data_dir", "other")):
            words = where if where[0] == "--dataset" else (*where, "--dataset", "flowers")
            shutil.copytree(flowers, "other/flowers", dirs_exist_ok=True)
            result = cli("train", *flags, *words, "--resume")
            assert (result.code, result.err) == (0, "")
        elsewhere = ("--max_memory_gb", "0", "--num_workers", 0)  # read otherwise
        assert cli("train", *flags, "--dataset", flowers, *elsewhere, "--resume").code == 0
