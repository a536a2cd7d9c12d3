"""The command line: its commands end to end, and a user's mistake is one line, exit code 2, and nothing written."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe import runs
from diffmoe.cli import COMMANDS, main
from diffmoe.config import GenerationConfig, VisualizationConfig
from diffmoe.config.settings import MODES

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

    def test_lists_the_flags_that_the_flat_form_is_known_by(self, cli, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        lines = [line.split(maxsplit=1) for line in cli("--help").out.splitlines()]
        told = {words[0]: words[1] for words in lines if words and words[0].startswith("--")}
        known = (
            "dataset mode batch_size epochs lr weight_decay checkpoint save_dir data_dir preset seed device precision"
        )
        assert told.keys() >= {f"--{name}" for name in [*known.split(), "resume"]}
        assert told["--epochs"] == "Passes over the training split"  # as the field's docstring says
        assert told["--mode"].startswith(", ".join(MODES))

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_a_command(self, cli, capsys, command):
        with pytest.raises(SystemExit) as caught:
            cli(command, "--help")
        assert caught.value.code == 0
        assert f"usage: diffmoe {command}" in capsys.readouterr().out

    @pytest.mark.parametrize("command", [None, *COMMANDS])
    def test_in_a_narrow_terminal_no_word_is_broken(self, capsys, monkeypatch, command):
        """A line may end after a word's hyphen, and is at most as long as the terminal is wide."""
        words = {}
        for columns in (60, 500):
            monkeypatch.setenv("COLUMNS", str(columns))
            if command is None:
                main(["--help"])
            else:
                with pytest.raises(SystemExit):
                    main([command, "--help"])
            out = capsys.readouterr().out
            assert command not in (None, "caption", "visualize") or max(map(len, out.splitlines())) <= columns
            words[columns] = re.sub(r"(?<=\w)-\n\s+", "-", out).split()
        assert words[60] == words[500]

    @pytest.mark.parametrize(("command", "config"), [("caption", GenerationConfig), ("visualize", VisualizationConfig)])
    def test_fields_that_are_flags_are_listed_with_what_they_do(self, capsys, command, config):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        source = inspect.getsource(config)
        for field in dataclasses.fields(config):
            (does,) = re.findall(rf"    {field.name}: .*\n    \"{{3}}(.*)\"{{3}}", source)
            assert re.search(rf"--{field.name} \S+ {re.escape(does)}", out)

    def test_version(self, cli, tmp_path):
        told = f"diffmoe {version('diff-moe')}\n"
        assert (cli("--version").code, cli("--version").out) == (0, told)
        done = run_python("-m", "diffmoe", "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, told, "")

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


MISTAKES: dict[str, str] = {
    # the command and its flags
    "trian": "unknown command 'trian' (did you mean 'train'?)",
    "train --epoch 3": "unknown flag --epoch (did you mean 'epochs'?)",
    "train --class_tokens 2": "unknown flag --class_tokens; --help lists all",
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
        monkeypatch.setattr(runs, "make_fabric", two_devices)
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

    monkeypatch.setattr(runs, "load_dataset", load_dataset)
    assert cli(*line.replace("{model}", str(trained.model)).split()).code == 2


def test_ctrl_c_outside_of_the_training_loop_is_no_traceback(cli, trained, tmp_path, monkeypatch):
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "load_dataset", interrupted)
    try:
        result = cli("test", "--checkpoint", trained.model, "--save_dir", tmp_path, "--output_dir", tmp_path)
    except KeyboardInterrupt:
        pytest.fail("the user sees a traceback")
    assert result.code == 128 + signal.SIGINT
    assert result.err == "diffmoe: stopped\n"


class TestJson:
    """stdout is the metrics and nothing else."""

    def test_of_a_test_is_what_the_file_holds(self, cli, own_run, tmp_path):
        where = ("--save_dir", own_run.save_dir, "--output_dir", tmp_path, "--device", "cpu")
        result = cli("test", *where, "--json")
        assert (result.code, result.err) == (0, "")
        told = json.loads(result.out)
        assert told == json.loads((own_run.save_dir / "digits" / "metrics.json").read_text())
        assert told["mode"] == "test"
        flat = cli("--mode", "test", *where, "--json")
        assert json.loads(flat.out) == told

    def test_of_training_leaves_stderr_for_how_it_goes_on(self, cli, tiny_flags, tmp_path):
        where = ("--save_dir", tmp_path / "runs", "--output_dir", tmp_path / "pictures")
        result = cli("train_test", *tiny_flags, "--epochs", 1, *where, "--json")
        assert result.code == 0
        assert {"val_accuracy", "test_accuracy"} <= json.loads(result.out).keys()
        assert "epoch 1/1" in result.err
        assert "precision  recall" not in result.err  # the metrics say it


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


class TestReadersThatLeave:
    """`| head -1`: a run goes on to its end, and all else ends, without a word."""

    def leave(self, cwd: Path, *argv: object, lines: int = 1) -> tuple[int, str]:
        """The exit code and stderr of a command of which only the first lines are read."""
        command = [sys.executable, str(REPO / "main.py"), *map(str, argv)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=cwd, text=True, stdout=pipe, stderr=pipe) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for _ in range(lines):
                process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read()
        return process.returncode, err

    def test_a_run_is_trained_and_saved_to_its_end(self, tiny_flags, tmp_path):
        assert self.leave(tmp_path, "train_test", "--epochs", 2, *tiny_flags) == (0, "")
        assert torch.load(tmp_path / "checkpoints/digits/last.ckpt", weights_only=True)["progress"]["epoch"] == 2
        assert (tmp_path / "visualizations" / "digits" / "calibration.png").is_file()

    @pytest.mark.parametrize("lines", [0, 1])
    def test_predictions_end_quietly(self, trained, drawn, tmp_path, lines):
        many = [drawn[0]] * 200  # more than a pipe's buffer of the program's own
        assert self.leave(tmp_path, "predict", "--checkpoint", trained.model, *many, lines=lines) == (0, "")

    def test_so_does_help(self, tmp_path):
        assert self.leave(tmp_path, "train", "--help", lines=0) == (0, "")


class TestNames:
    """What a terminal, a tokenizer or a file cannot carry costs a character, not the work."""

    def predict(self, trained: Any, picture: Path, encoding: str, *flags: object) -> str:
        command = [sys.executable, str(REPO / "main.py"), "predict", "--checkpoint", trained.model, picture, *flags]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode(encoding)

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
    def test_a_terminal_that_lacks_a_character_gets_another(self, trained, drawn, tmp_path, encoding):
        picture = tmp_path / "七.png"
        shutil.copy(drawn[0], picture)
        table = self.predict(trained, picture, encoding)
        assert len(table.splitlines()) == 6
        assert "?" in table
        told = json.loads(self.predict(trained, picture, encoding, "--json"))
        assert told[0]["image"] == str(picture)  # JSON has escapes

    def test_a_class_that_is_no_utf8_is_trained_and_tested(self, cli, tiny_flags, flowers, tmp_path):
        train = flowers / "train"
        (train / "rose").rename(train / os.fsdecode(b"caf\xe9"))
        flags = [*tiny_flags, "--dataset", flowers, "--epochs", 1, "--img_size", 8, "--patch_size", 4]
        for _ in range(2):  # the second time from the cache
            where = ("--save_dir", tmp_path / "runs", "--output_dir", tmp_path / "shown", "--overwrite")
            result = cli("train_test", *flags, *where)
            assert (result.code, result.err) == (0, "")
        metrics = json.loads((tmp_path / "runs/flowers/metrics.json").read_text("utf-8"))
        assert metrics["class_names"] == ["caf\\xe9", "tulip"]

    def test_a_dataset_that_is_no_utf8_is_one_line_before_training(self, cli, tiny_flags, flowers, tmp_path, snapshot):
        """TensorBoard writes into no folder of such a name."""
        named = flowers.rename(tmp_path / os.fsdecode(b"fleurs d'\xe9t\xe9"))
        before = snapshot(tmp_path)
        result = cli("train", *tiny_flags, "--dataset", named, "--save_dir", tmp_path / "runs")
        told = f"{tmp_path}/runs/fleurs d'\\udce9t\\udce9 is not UTF-8, as TensorBoard needs it: rename it"
        assert (result.code, result.err) == (2, f"diffmoe: error: {told}\n")
        assert snapshot(tmp_path) == before


def test_a_dataset_named_by_dots_writes_files_of_its_own_name(cli, tiny_flags, flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(flowers / "train")
    flags = [*tiny_flags, "--dataset", "..", "--epochs", 1, "--img_size", 8, "--patch_size", 4]
    result = cli("train", *flags, "--save_dir", tmp_path / "runs")
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["flowers", "flowers_model.pth"]


def in_a_process(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=True, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_disk_without_room_for_stdout_ends_no_work_and_is_said() -> None:
    said = "stdout cannot be written (No space left on device): what is printed is lost from here on\n"
    working = (
        "import sys; from diffmoe.commands.parsing import show, tell; "
        "tell('epoch 1'); tell('epoch 2'); show({}, True, print); print('the end', file=sys.stderr)"
    )
    with open("/dev/full", "w") as full:
        assert in_a_process(working, stdout=full).stderr == f"{said}the end\n"


def test_what_matplotlib_says_of_its_cache_is_not_told() -> None:
    """Where there is no home it says so in two long lines, with any command."""
    without_home = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "MPLCONFIGDIR"))}
    code = "from diffmoe.cli import main; main(['--version']); import matplotlib as m; print(m.get_cachedir())"
    done = in_a_process(code, stdout=subprocess.PIPE, env=without_home | {"HOME": "/dev/null"})
    assert done.stderr == ""
    assert "/dev/null" not in done.stdout
