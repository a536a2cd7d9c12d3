"""The command line: its commands end to end, and a user's mistake is one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.cli import COMMANDS
from diffmoe.commands import classification, training

REPO = Path(__file__).resolve().parents[1]


def run_python(*argv: object, cwd: Path, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False)


class TestHelp:
    @pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
    def test_lists_the_commands(self, cli, argv):
        result = cli(*argv)
        assert (result.code, result.err) == (0, "")
        assert all(f"  {name} " in result.out for name in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_a_command(self, cli, capsys, command):
        with pytest.raises(SystemExit) as caught:
            cli(command, "--help")
        assert caught.value.code == 0
        assert f"usage: diffmoe {command}" in capsys.readouterr().out

    def test_answers_at_once(self, tmp_path):
        """And so imports nothing heavy."""
        code = "import sys; from diffmoe.cli import main; main(['--help']); "
        code += (
            "print([name for name in ('torch', 'lightning_fabric', 'datasets', 'matplotlib') if name in sys.modules])"
        )
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            done = run_python("-c", code, cwd=tmp_path)
            seconds.append(time.perf_counter() - started)
            assert done.stdout.endswith("[]\n")
        assert min(seconds) < 1.5


Draw = Callable[[], Image.Image]


def noise(mode: str, *shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode=None).convert(mode)


PICTURES: dict[str, Draw] = {
    "grey.png": lambda: noise("L", 8, 8),
    "colour.jpg": lambda: noise("RGB", 20, 30, 3),
    "alpha.png": lambda: noise("RGBA", 9, 9, 4),
    "big.jpg": lambda: noise("RGB", 1500, 2000, 3),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of every kind, and two that are none: `corrupt.png` and `half.jpg`."""
    folder = tmp_path_factory.mktemp("drawn")
    for name, draw in PICTURES.items():
        draw().save(folder / name)
    (folder / "corrupt.png").write_bytes(b"no picture at all")
    (folder / "half.jpg").write_bytes((folder / "big.jpg").read_bytes()[:9000])
    return [folder / name for name in PICTURES]


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


MISTAKES: dict[str, str] = {
    # the command and its flags
    "trian": "unknown command 'trian' (did you mean 'train'?)",
    "train --epoch 3": "unknown flag --epoch (did you mean 'epochs'?)",
    "train digits": "unrecognized arguments: digits",
    "--mode tran": "--mode: invalid choice: 'tran'",
    "train --lr fast": "lr is 'fast': it must be a number",
    "train --lr 0": "lr is 0.0: it must be over 0",
    "train --preset tinny": "did you mean 'tiny'?",
    "train --config nowhere.yaml": "nowhere.yaml: No such file",
    "train --embed_dim 10 --num_heads 4": "embed_dim is 10: it must be a multiple of num_heads (4)",
    "train --num_general_experts 4 --top_k 9": "top_k is 9: it must be at most num_general_experts (4)",
    "train --img_size 9": "img_size is 9: it must be a multiple of patch_size (2)",
    "train --seed 99999999999999999999": "seed is 99999999999999999999",
    "train --batch_size 99999999999999999999": "batch_size is 99999999999999999999",
    # what the machine or the data does not have
    "train --device mps": "device is 'mps': this machine has",
    "train --vocab_size 100": "vocab_size is 100",  # the tokenizer's ids go to 49407
    "train --in_channels 2": "in_channels is 2: it must be 1 (grey) or 3 (colour)",
    "train --crop_padding 8": "crop_padding is 8",
    "train --num_classes 3": "num_classes is 3: digits has 10 classes",
    "train --num_devices 2 --device cpu --batch_size 63": "batch_size is 63: it must be a multiple of the 2 devices",
    "train --dataset cifar": "dataset is 'cifar' (did you mean 'cifar10'?)",
    "train --dataset cifar10 --data_dir nowhere": "data_dir is 'nowhere': it must be a folder that exists",
    "train --dataset cifar10 --data_dir empty": "cifar10",
    # where it writes
    "train --save_dir file": "cannot be written",
    "train --save_dir file/sub": "cannot be written",
    "train_test --output_dir file": "cannot be written",
    "train --resume": "resume: there is no checkpoints/digits/last.ckpt to go on from",
    "train --resume --overwrite": "resume is True",
    "train --checkpoint {model}": "checkpoint is for test",
    # testing
    "test": "checkpoint checkpoints/digits_model.pth does not exist",
    "test --checkpoint nowhere.pth": "checkpoint nowhere.pth does not exist",
    "test --checkpoint {model} --embed_dim 32": "embed_dim is 32: the model in {model} has 16",
    "test --checkpoint {model} --dataset pets": "{model} was trained on the classes of digits",
    "test --checkpoint {model} --output_dir file": "cannot be written",
    "test --checkpoint {model} --device mps": "device is 'mps'",
    # predicting
    "predict": "the following arguments are required",
    "predict --checkpoint {model}": "the following arguments are required: IMAGE",
    "predict --checkpoint {model} --top 0 a.png": "top is 0: it must be at least 1",
    "predict --checkpoint {model} --top many a.png": "invalid int value: 'many'",
    "predict --checkpoint {model} --tap 3 a.png": "--tap",
    "predict --checkpoint {model} --device mps {picture}": "device is 'mps'",
    "predict --checkpoint {model} a.png": "a.png: No such file",
}
"""Command lines of a folder that holds `file`, `empty/` and a dataset `pets/`, and what they are told."""


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(line, cli, trained, drawn, tmp_path, monkeypatch, caplog, snapshot):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    Path("empty").mkdir()
    for name in ("cat", "dog"):
        Path("pets", "train", name).mkdir(parents=True)
        for number in range(12):
            shutil.copy(drawn[0], Path("pets", "train", name, f"{number}.png"))
    if "--num_devices" in line:
        monkeypatch.setattr(training, "make_fabric", two_devices)
    before = snapshot(tmp_path)
    names = {"{model}": str(trained.model), "{picture}": str(drawn[0])}
    result = cli(*(names.get(word, word) for word in line.split()), *([] if "predict" in line else ["--epochs", 1]))
    assert result.code == 2
    assert result.err.startswith("diffmoe: error: ")
    assert MISTAKES[line].replace("{model}", names["{model}"]) in result.err
    assert len(result.err.splitlines()) == 1
    assert caplog.records == []
    assert snapshot(tmp_path) == before


def two_devices(run: Any) -> Any:
    """The first of two ranks, without the second."""
    from lightning_fabric import Fabric

    class Two(Fabric):
        @property
        def world_size(self) -> int:
            return 2

    return Two(accelerator="cpu", devices=1)


@pytest.mark.parametrize(
    "line",
    [line for line in MISTAKES if line.startswith(("train --lr", "train --num_general", "train --seed", "test"))],
)
def test_settings_and_checkpoints_are_checked_before_any_data_is_read(line, cli, trained, monkeypatch, tmp_path):
    if "pets" in line:
        pytest.skip("the classes of the data are what is checked")
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(classification, "load_dataset", load_dataset)
    assert cli(*line.replace("{model}", str(trained.model)).split()).code == 2


class TestRuns:
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
        assert cli("train", *flags).code == 0
        state = torch.load(tmp_path / "digits_model.pth", weights_only=True)["state_dict"]
        assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}

    def test_of_hours_on_a_cpu_names_a_smaller_preset(self, cli, tiny_flags, tmp_path, monkeypatch):
        monkeypatch.setattr(training, "HOUR", 1e-9)
        flags = [*tiny_flags, "--epochs", 1, "--batch_size", 12]  # 23 steps: the estimate comes after 20
        assert "--preset tiny is a smaller model" in cli("train", *flags, "--save_dir", tmp_path / "a").out
        quiet = cli("train", *flags, "--save_dir", tmp_path / "b", "--preset", "tiny").out
        assert "note: this will take about" in quiet
        assert "smaller model" not in quiet

    def test_that_diverges_is_one_line(self, cli, tiny_flags, tmp_path):
        result = cli("train", *tiny_flags, "--epochs", 1, "--lr", 1e30, "--clip_norm", 0, "--save_dir", tmp_path)
        assert result.code == 2
        assert "lower" in result.err
        assert len(result.err.splitlines()) == 1

    def test_ctrl_c_outside_of_the_training_loop_is_no_traceback(self, cli, trained, tmp_path, monkeypatch):
        def interrupted(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(classification, "load_dataset", interrupted)
        try:
            result = cli("test", "--checkpoint", trained.model, "--save_dir", tmp_path, "--output_dir", tmp_path)
        except KeyboardInterrupt:
            pytest.fail("the user sees a traceback")
        assert result.code == 128 + signal.SIGINT

    def test_metrics_json_that_is_damaged_is_one_line(self, cli, own_run, tmp_path):
        (own_run.save_dir / "digits" / "metrics.json").write_text('{"half": ')
        result = cli("test", "--save_dir", own_run.save_dir, "--output_dir", tmp_path)
        assert result.code == 2
        assert "metrics.json" in result.err


class TestProcesses:
    def test_flat_form_end_to_end(self, tiny_flags, tmp_path):
        argv = ["--dataset", "digits", "--mode", "train_test", "--batch_size", "64", "--epochs", "1", *tiny_flags]
        done = run_python("-W", "error", REPO / "main.py", *argv, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "epoch 1/1" in done.stdout
        assert "zero-shot accuracy" in done.stdout
        assert (tmp_path / "checkpoints" / "digits_model.pth").is_file()
        assert (tmp_path / "visualizations" / "digits" / "training_curves.png").is_file()

    def test_ctrl_c_saves_and_exits_with_its_code(self, tiny_flags, tmp_path):
        argv = ["--dataset", "digits", "--mode", "train_test", "--epochs", "10000", *tiny_flags]
        command = [sys.executable, str(REPO / "main.py"), *argv]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            while "epoch 1/10000" not in process.stdout.readline():
                assert process.poll() is None
            os.kill(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT
        last = "checkpoints/digits/last.ckpt"
        assert err == f"stopped by SIGINT, saved in {last}: the same command with --resume goes on\n"
        assert "test, " not in out
        assert torch.load(tmp_path / last, weights_only=True)["progress"]["step"] > 0

    def test_two_processes_stay_equal(self, cli, tiny_flags, drawn, tmp_path):
        script = tmp_path / "spy.py"
        script.write_text(SPY)
        flags = [*tiny_flags, "--epochs", "2", "--accumulation_steps", "2", "--patience", "1", "--lr", "0.003"]
        done = run_python(script, "train", *flags, "--num_devices", 2, "--batch_size", 32, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
        unequal = [name for name, tensor in first["model"].items() if not torch.equal(tensor, second["model"][name])]
        assert unequal == []
        assert first["progress"] == second["progress"]  # or one rank stops early and the other waits for ever
        assert "digits: 269 training" in done.stdout
        assert done.stdout.count("epoch 2/2") == 1
        assert cli("predict", "--checkpoint", tmp_path / "checkpoints" / "digits_model.pth", *drawn).code == 0


SPY = """
import sys, torch
from diffmoe import cli
from diffmoe.commands import training

save_run = training.save_run

def spy(path, fabric, model, optimizer, progress, configs):
    validation = [(row["val_loss"], row["val_accuracy"]) for row in progress.history]
    state = {"model": model.state_dict(), "progress": (progress.step, validation)}
    torch.save(state, f"rank{fabric.global_rank}.pt")
    save_run(path, fabric, model, optimizer, progress, configs)

training.save_run = spy
sys.exit(cli.main())
"""
