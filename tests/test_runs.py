"""A run is a function: settings in, metrics out; and what it leaves on disk is whole, and nobody else's."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tests.training.events import read_scalars
from tests.training.signals import send_at

import diffmoe
from diffmoe import hardware, runs
from diffmoe.commands import train as command
from diffmoe.config import DataConfig, UserError
from diffmoe.config.settings import parse_settings
from diffmoe.data.loading import load_dataset
from diffmoe.hardware import Threads
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.patch_embed import Whitening
from diffmoe.storage.model_files import load_model_file
from diffmoe.storage.run_files import RunFiles
from diffmoe.tasks.classification import Classification
from diffmoe.training.loop import StopRequested
from diffmoe.training.objective import Trainee


def read_metrics(save_dir: Path) -> dict[str, Any]:
    return json.loads((save_dir / "digits" / "metrics.json").read_text())


FLAGS: dict[str, Any] = {
    **{"device": "cpu", "embed_dim": 16, "num_heads": 2, "img_encoder_layers": 1, "text_encoder_layers": 1},
    **{"text_embed_dim": 8, "max_text_len": 8, "test_fraction": 0.7, "val_fraction": 0.5, "precision": "32-true"},
}
"""Those of `tiny_flags`."""


def process_state() -> list[Any]:
    """What a run changes for its process while it is on."""
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - it is there
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return [
        *handlers,
        torch.get_rng_state().tolist(),
        random.getstate(),
        matmul.fp32_precision,
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    ]


class TestFunctions:
    def test_give_the_metrics_and_leave_the_process_as_it_was(self, tmp_path, capfd):
        before = process_state()
        where: dict[str, Any] = {"dataset": "digits", "save_dir": tmp_path / "runs", "output_dir": str(tmp_path)}
        trained = diffmoe.train(**FLAGS, **where, epochs=1, data_dir=None, flip=False, quiet=True)
        assert process_state() == before
        assert trained == read_metrics(tmp_path / "runs")
        assert (trained["dataset"], trained["mode"], trained["epochs"]) == ("digits", "train", 1)
        tested = diffmoe.test(**FLAGS, **where, quiet=True)
        assert process_state() == before
        assert tested == read_metrics(tmp_path / "runs")
        assert 0 <= tested["test_accuracy"] <= 1
        assert trained.items() - {("mode", "train")} <= {(k, v) for k, v in tested.items() if k in trained}
        assert capfd.readouterr() == ("", "")

    def test_say_what_the_commands_say_unless_quiet(self, tmp_path, capsys, cli, own_run):
        diffmoe.train(**FLAGS, save_dir=tmp_path / "runs", epochs=1)
        told = capsys.readouterr()
        assert "epoch 1/1" in told.out
        assert told.err == ""
        where = ("--save_dir", own_run.save_dir, "--output_dir", tmp_path)
        diffmoe.test(save_dir=own_run.save_dir, output_dir=tmp_path, device="cpu")
        told = capsys.readouterr().out
        assert told == cli("test", *where, "--device", "cpu").out
        assert "test, 1,258 pictures" in told  # as it was split for training, not by the defaults

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            ({"epoch": 3}, r"unknown flag --epoch \(did you mean 'epochs'\?\)"),
            ({"epochs": 0}, "epochs is 0: it must be at least 1"),
            ({"lr": "fast"}, "lr is 'fast': it must be a number"),
            ({"dataset": "nowhere"}, "dataset is 'nowhere'"),
            ({"mode": "test"}, "unknown flag --mode"),
        ],
    )
    def test_a_mistake_is_raised(self, tmp_path, monkeypatch, flags, says):
        monkeypatch.chdir(tmp_path)
        for run in (diffmoe.train, diffmoe.test):
            with pytest.raises(UserError, match=says):
                run(**flags)
        assert list(tmp_path.iterdir()) == []

    def test_what_stops_a_run_is_raised_and_it_can_go_on(self, tmp_path, monkeypatch):
        before = process_state()
        with monkeypatch.context() as patch:
            send_at(patch, Trainee, "step", [2], signal.SIGINT)
            with pytest.raises(KeyboardInterrupt, match="SIGINT"):
                diffmoe.train(**FLAGS, save_dir=tmp_path, epochs=1, quiet=True)
        assert process_state() == before
        assert diffmoe.train(**FLAGS, save_dir=tmp_path, epochs=1, quiet=True, resume=True)["steps"] == 5

    def test_testing_on_several_devices_is_one_line(self, cli, own_run, snapshot):
        before = snapshot(own_run.save_dir)
        with pytest.raises(UserError, match=r"^num_devices is 2: testing runs on 1$"):
            diffmoe.test(save_dir=own_run.save_dir, num_devices=2)
        result = cli("test", "--save_dir", own_run.save_dir, "--num_devices", 2)
        assert (result.code, result.err) == (2, "diffmoe: error: num_devices is 2: testing runs on 1\n")
        assert snapshot(own_run.save_dir) == before

    @pytest.mark.parametrize(("precision", "dtype"), [("32-true", None), ("bf16-mixed", torch.bfloat16)])
    def test_testing_is_in_the_precision_asked_for(self, own_run, tmp_path, monkeypatch, precision, dtype):
        found = []
        classify = ImageClassifier.classify

        def look(*args: Any, **kwargs: Any) -> Any:
            found.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return classify(*args, **kwargs)

        monkeypatch.setattr(ImageClassifier, "classify", look)
        where = {"save_dir": own_run.save_dir, "output_dir": tmp_path, "device": "cpu"}
        diffmoe.test(**where, precision=precision, quiet=True)
        assert set(found) == {dtype}


class TestRuns:
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

    def test_accuracy_is_told_with_views_and_without_and_never_of_an_earlier_test(self, cli, own_run, tmp_path):
        where = ("--save_dir", own_run.save_dir, "--output_dir", tmp_path)
        plain = cli("test", *where)
        accuracy = read_metrics(own_run.save_dir)["test_accuracy"]
        assert "views" not in plain.out
        result = cli("test", *where, "--tta", "flip")
        metrics = read_metrics(own_run.save_dir)
        assert metrics["test_accuracy"] == accuracy != metrics["test_accuracy_tta"]
        assert f"mean over the views {metrics['test_accuracy_tta']:.2%}" in " ".join(result.out.split())
        assert cli("test", *where).out == plain.out
        assert "test_accuracy_tta" not in read_metrics(own_run.save_dir)

    def test_of_a_folder_of_pictures(self, cli, tiny_flags, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        generator = np.random.default_rng(0)
        for name, grey in (("bright", 200), ("dark", 30)):
            Path("pets", "train", name).mkdir(parents=True)
            for number in range(12):
                pixels = np.clip(generator.normal(grey, 10, (9, 11)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(Path("pets", "train", name, f"{number}.png"))
        flags = [*tiny_flags, "--dataset", "pets", "--img_size", 8, "--patch_size", 2, "--in_channels", 1]
        result = cli("train_test", *flags, "--epochs", 1)
        assert (result.code, result.err) == (0, "")
        assert "pets: " in result.out
        metrics = json.loads(Path("checkpoints/pets/metrics.json").read_text())
        assert metrics["class_names"] == ["bright", "dark"]
        assert Path("visualizations/pets/confusion_matrix.png").is_file()

    def test_of_a_dense_model_tested_twice_says_the_same(self, cli, tiny_flags, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert cli("train", *tiny_flags, "--preset", "tiny-dense", "--epochs", 1).code == 0
        first, again = cli("test"), cli("test", "--preset", "tiny-dense")
        assert first.code == 0
        assert first.out == again.out

    def test_in_bfloat16_is_saved_in_float32(self, cli, tiny_flags, tmp_path):
        flags = [*tiny_flags, "--epochs", 1, "--save_dir", tmp_path, "--precision", "bf16-mixed"]
        result = cli("train", *flags)
        assert (result.code, result.err) == (0, "")
        assert "; on cpu in bfloat16\n" in result.out
        state = torch.load(tmp_path / "digits_model.pth", weights_only=True)["state_dict"]
        assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}

    def test_of_hours_on_a_cpu_names_a_smaller_preset_before_all_progress(self, cli, tiny_flags, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "HOUR", 1e-9)
        flags = [*tiny_flags, "--epochs", 1]
        told = cli("train", *flags, "--save_dir", tmp_path / "a").out.splitlines()
        (note,) = [line for line in told if line.startswith("note: ")]
        assert re.fullmatch(
            r"note: about [\d,]+ hours on this processor; --preset tiny, made for a CPU, takes minutes", note
        )
        assert not any(line.startswith("epoch") for line in told[: told.index(note)])
        quiet = cli("train", *flags, "--save_dir", tmp_path / "b", "--preset", "tiny").out
        assert "note: about" in quiet
        assert "--preset" not in quiet

    @pytest.mark.parametrize(
        ("patch_embed", "patch_size", "start_size"), [("conv", 8, 1), ("whitened", 8, 1), ("conv", 4, 0.5)]
    )
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_a_batch_that_batchnorm_cannot_learn_from_is_one_line(
        self, cli, tiny_flags, flowers, tmp_path, snapshot, batch_size, patch_embed, patch_size, start_size
    ):
        """4 are left to train on."""
        flags = [*tiny_flags, "--dataset", flowers, "--patch_embed", patch_embed, "--img_size", 8]
        flags += ["--patch_size", patch_size, "--start_size", start_size]
        before = snapshot(tmp_path)
        argv = ("train", *flags, "--epochs", 1, "--save_dir", tmp_path / "runs", "--batch_size")
        result = cli(*argv, batch_size)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"batch_size is {batch_size}: " in result.err
        assert snapshot(tmp_path) == before
        assert cli(*argv, 2).code == 0

    def test_whitens_by_its_first_training_pictures_once(self, cli, tiny_flags, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "WHITENING_SAMPLE", 100)
        seen: list[torch.Tensor] = []
        fit = Whitening.fit
        monkeypatch.setattr(Whitening, "fit", lambda self, images: (seen.append(images), fit(self, images)))
        flags = [*tiny_flags, "--patch_embed", "whitened", "--epochs", 2, "--save_dir", tmp_path]
        send_at(monkeypatch, Trainee, "step", [2], signal.SIGTERM)
        assert [cli("train", *flags, *more).code for more in ((), ("--resume",))] == [143, 0]
        assert cli("test", "--save_dir", tmp_path, "--output_dir", tmp_path).code == 0
        loaded = load_model_file(tmp_path / "digits_model.pth")
        config = DataConfig(val_fraction=0.5, test_fraction=0.7)
        data = load_dataset(config, loaded.picture)
        assert len(seen) == 1
        assert torch.equal(seen[0], loaded.picture.normalize(data.train.images[:100]))
        expected = Whitening(1)
        fit(expected, seen[0])
        assert torch.equal(loaded.model.state_dict()["backbone.patch_embed.projection.0.weight"], expected.weight)

    def test_that_diverges_is_one_line(self, cli, tiny_flags, tmp_path):
        result = cli("train", *tiny_flags, "--epochs", 1, "--lr", 1e30, "--clip_norm", 0, "--save_dir", tmp_path)
        assert result.code == 2
        assert "lower" in result.err
        assert len(result.err.splitlines()) == 1

    def test_metrics_json_that_is_damaged_is_one_line(self, cli, own_run, tmp_path):
        (own_run.save_dir / "digits" / "metrics.json").write_text('{"half": ')
        result = cli("test", "--save_dir", own_run.save_dir, "--output_dir", tmp_path)
        assert result.code == 2
        assert "metrics.json" in result.err


class TestConfigFile:
    """`config.yaml` repeats the run that left it, whatever layers its settings came from."""

    @pytest.mark.parametrize("of", ["trained", "captioned"])
    def test_repeats_the_run_to_the_same_weights(self, cli, request, tmp_path, of):
        run = request.getfixturevalue(of)
        name, again = run.model.name.removesuffix("_model.pth"), tmp_path / "again"
        config = run.save_dir / name / "config.yaml"
        assert cli("train", "--config", config, "--save_dir", again).err == ""
        made, copied = (torch.load(folder / run.model.name, weights_only=True) for folder in (run.save_dir, again))
        assert (made["model_config"], made["data"]) == (copied["model_config"], copied["data"])
        torch.testing.assert_close(copied["state_dict"], made["state_dict"], rtol=0, atol=0)
        told = [yaml.safe_load(path.read_text()) for path in (config, again / name / "config.yaml")]
        assert told[1] == {**told[0], "save_dir": str(again)}
        assert cli("test", "--config", again / name / "config.yaml", "--output_dir", tmp_path / "pictures").code == 0

    def test_says_how(self, own_run):
        first = (own_run.save_dir / "digits" / "config.yaml").read_text().splitlines()[0]
        assert re.fullmatch(r"# OMP_NUM_THREADS=\d+ diffmoe train --config \S+/checkpoints/digits/config.yaml", first)

    def test_is_that_of_the_last_run_and_begins_as_the_next_one_is_told(self, cli, own_run):
        flags = [*own_run.flags, "--save_dir", own_run.save_dir, "--epochs", 1]
        assert cli("train", *flags, "--overwrite", "--seed", 1).code == 0
        config = own_run.save_dir / "digits" / "config.yaml"
        told = yaml.safe_load(config.read_text())
        assert told["seed"] == 1
        assert not {"overwrite", "resume"} & told.keys()
        assert cli("train", "--config", config).code == 2  # it would overwrite
        assert cli("train", "--config", config, "--overwrite").code == 0


class TestThreads:
    def run(self, monkeypatch: pytest.MonkeyPatch, count: int, *flags: object) -> tuple[list[str], int]:
        """What is told of a run on a machine that has so many cores to give, and with how many threads it was made."""
        used: list[int] = []
        original = Trainee.step
        with monkeypatch.context() as patch:
            patch.delenv("OMP_NUM_THREADS")
            patch.setattr(hardware, "choose_threads", lambda: Threads(count, f"threads: {count}, as it is"))
            patch.setattr(Trainee, "step", lambda *args: used.append(torch.get_num_threads()) or original(*args))
            lines: list[str] = []
            runs.train_run(parse_settings([str(flag) for flag in flags], mode="train"), lines.append)
        (threads,) = set(used)
        return [line for line in lines if line.startswith("threads")], threads

    def test_are_those_chosen_and_a_resumed_run_keeps_those_that_it_began_with(self, own_run, tmp_path, monkeypatch):
        """The last bit of a sum depends on them."""
        flags = (*own_run.flags, "--save_dir", tmp_path)
        before = torch.get_num_threads()
        with monkeypatch.context() as patch:
            send_at(patch, Trainee, "step", [3], signal.SIGTERM)
            with pytest.raises(StopRequested):
                self.run(patch, 3, *flags)
        assert self.run(monkeypatch, 2, *flags, "--resume") == (["threads: 3, as the run began with"], 3)
        assert torch.get_num_threads() == before
        assert self.run(monkeypatch, 2, *flags, "--overwrite") == (["threads: 2, as it is"], 2)

    def test_that_the_user_set_hold_for_a_resumed_run_too(self, own_run, tmp_path, monkeypatch):
        flags = (*own_run.flags, "--save_dir", tmp_path)
        with monkeypatch.context() as patch:
            send_at(patch, Trainee, "step", [3], signal.SIGTERM)
            with pytest.raises(StopRequested):
                self.run(patch, 3, *flags)
        lines: list[str] = []
        used: list[int] = []
        original = Trainee.step
        monkeypatch.setattr(Trainee, "step", lambda *args: used.append(torch.get_num_threads()) or original(*args))
        runs.train_run(parse_settings([*map(str, flags), "--resume"], mode="train"), lines.append)
        assert set(used) == {torch.get_num_threads()}
        assert not any(line.startswith("threads") for line in lines)


class TestOverwriting:
    def test_is_refused_unless_told(self, cli, own_run, snapshot):
        before = snapshot(own_run.save_dir)
        result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir)
        assert result.code == 2
        assert result.err == (
            f"diffmoe: error: {own_run.model} is an earlier run's: give --resume, --overwrite or another --save_dir\n"
        )
        assert snapshot(own_run.save_dir) == before

    @pytest.mark.parametrize(
        "left", ["digits_model.pth", "digits/last.ckpt", "digits/metrics.json", "digits/config.yaml"]
    )
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


class TestReplacing:
    """Whatever moment a run dies at, there is a whole earlier run or a whole new one."""

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

        monkeypatch.setattr(Classification, "validate", die)
        assert cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--overwrite").code == 130
        assert snapshot(own_run.save_dir) == before

    def test_a_run_stopped_in_its_first_epoch_is_whole(self, cli, own_run, monkeypatch):
        before = own_run.model.read_bytes()
        flags = [*own_run.flags, *ONE_EPOCH, "--save_dir", own_run.save_dir]
        with monkeypatch.context() as patch:
            send_at(patch, Trainee, "step", [1], signal.SIGTERM)
            assert cli("train", *flags, "--overwrite").code == 143
        assert own_run.model.read_bytes() != before
        assert {path.name for path in (own_run.save_dir / "digits").iterdir()} == {"last.ckpt", "config.yaml"}
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

    @pytest.mark.parametrize("of", ["history", "terminal"])
    def test_what_cannot_be_told_costs_nothing_that_was_trained(self, cli, own_run, monkeypatch, of):
        def fail(*what: Any) -> None:
            if of == "history" or what[0].startswith("epoch"):
                raise RuntimeError

        flags = [*own_run.flags, *ONE_EPOCH, "--save_dir", own_run.save_dir]
        with monkeypatch.context() as patch:
            patch.setattr(*((RunFiles, "write_history") if of == "history" else (command, "tell")), fail)
            with pytest.raises(RuntimeError):
                cli("train", *flags, "--overwrite")
        assert cli("train", *flags, "--resume").code == 0
        metrics = read_metrics(own_run.save_dir)
        assert (metrics["seed"], metrics["epochs"]) == (1, 1)
        assert len(RunFiles("digits", str(own_run.save_dir)).read_history()) == 1

    def test_killed_between_the_model_and_the_checkpoint(self, cli, own_run, tmp_path):
        """By SIGKILL, as the new model is in place and the new last.ckpt is not: the next command puts it there."""
        old_model, old_last = own_run.model.read_bytes(), (own_run.save_dir / "digits" / "last.ckpt").read_bytes()
        flags = [*own_run.flags, *ONE_EPOCH, "--save_dir"]
        argv = [str(flag) for flag in ("train", *flags, own_run.save_dir, "--overwrite")]
        done = subprocess.run([sys.executable, "-c", KILL_BETWEEN, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert own_run.model.read_bytes() != old_model
        assert (own_run.save_dir / "digits" / "last.ckpt").read_bytes() == old_last

        tested = shutil.copytree(own_run.save_dir, tmp_path / "tested")
        assert cli("test", *own_run.flags, "--save_dir", tested, "--output_dir", tmp_path / "pictures").code == 0
        assert "epochs" not in read_metrics(tested)  # those were the earlier run's
        for save_dir in (own_run.save_dir, tested):
            former = cli("train", *own_run.flags, "--save_dir", save_dir, "--resume")
            assert former.code == 2
            assert "but was 1 in" in former.err
            assert cli("train", *flags, save_dir, "--resume").code == 0
            assert read_metrics(save_dir)["seed"] == 1


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
            place = "flowers/profile" if argv[0] == "profile" else "flowers"
            assert result.err.startswith(f"diffmoe: error: output_dir leads to {place}, in flowers, the folder of the")
            assert snapshot(flowers) == before

    def test_a_made_set_has_no_folder(self, cli, tiny_flags, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert cli("train", *tiny_flags, "--epochs", 1, "--save_dir", ".").code == 0
        assert cli("train", *tiny_flags, "--epochs", 1, "--save_dir", ".", "--resume").code == 0


def test_a_guided_run_tells_how_far_pictures_are_from_their_experts(tmp_path):
    where: dict[str, Any] = {"dataset": "digits", "save_dir": tmp_path, "quiet": True}
    diffmoe.train(**FLAGS, **where, epochs=2, router_guidance_weight=1.0, lr=0.003, ema_decay=0.5)
    losses = [row["router_guidance_loss"] for row in RunFiles("digits", str(tmp_path)).read_history()]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    state = load_model_file(RunFiles("digits", str(tmp_path)).model).model.state_dict()
    assert not any("guid" in name or "super" in name for name in state)
    with pytest.raises(UserError, match=r"num_general_experts is 11: .* there are 10 classes"):
        diffmoe.train(**FLAGS, **where, num_general_experts=11, router_guidance_weight=1.0, overwrite=True)
