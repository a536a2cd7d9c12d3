"""Which devices a run gets; and two ranks decide together, end together, and learn as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe.config import RunConfig, UserError
from diffmoe.training.parallel import any_of, best_precision, make_fabric, total

REPO = Path(__file__).resolve().parents[2]


class TestDevices:
    def test_fabric_on_a_cpu_computes_in_float32(self) -> None:
        fabric = make_fabric(RunConfig(device="cpu"))
        assert (fabric.device.type, fabric.world_size) == ("cpu", 1)
        assert fabric.setup(torch.nn.Linear(3, 2))(torch.zeros(1, 3)).dtype == torch.float32

    def test_more_gpus_than_there_are_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(UserError, match=r"^num_devices is 3: this machine has 2$"):
            make_fabric(RunConfig(device="cuda", num_devices=3))

    def test_several_of_apples_gpus_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        with pytest.raises(UserError, match=r"^num_devices is 2: on mps it must be 1$"):
            make_fabric(RunConfig(device="mps", num_devices=2))

    @pytest.mark.parametrize(
        ("has_it", "emulates_it", "precision"),
        [(True, True, "bf16-mixed"), (False, True, "32-true"), (False, False, "32-true")],
    )
    def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(
        self, monkeypatch: pytest.MonkeyPatch, has_it: bool, emulates_it: bool, precision: str
    ) -> None:
        def is_bf16_supported(including_emulation: bool = True) -> bool:
            return has_it or (including_emulation and emulates_it)

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        assert best_precision(torch.device("cuda")) == precision

    @pytest.mark.parametrize(("has_amx", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
    def test_a_processor_computes_in_bfloat16_where_it_has_amx(
        self, monkeypatch: pytest.MonkeyPatch, has_amx: bool, precision: str
    ) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
        assert best_precision(torch.device("cpu")) == precision
        assert best_precision(torch.device("mps")) == "32-true"
        fabric = make_fabric(RunConfig(device="cpu"))
        assert fabric.strategy.precision.precision == precision
        asked = make_fabric(RunConfig(device="cpu", precision="32-true"))
        assert asked.strategy.precision.precision == "32-true"

    def test_one_rank_has_nobody_to_ask(self) -> None:
        fabric = make_fabric(RunConfig(device="cpu"))
        value = torch.ones(2)
        assert total(fabric, value) is value
        assert any_of(fabric, True, False) == [True, False]


@dataclass(frozen=True)
class Both:
    """What two processes did; that both wrote it tells that both ended."""

    folder: Path
    out: str

    def found(self, name: str) -> tuple[Any, Any]:
        """What each of them found in a case."""
        first, second = (json.loads((self.folder / f"rank{rank}.json").read_text())[name] for rank in (0, 1))
        return first, second


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Both:
    """`two_ranks.py`, run by two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    flags = [*tiny_flags, "--epochs", "2", "--accumulation_steps", "2", "--patience", "1", "--lr", "0.003"]
    flags += ["--patch_embed", "whitened", "--optimizer", "muon", "--ema_decay", "0.9"]
    script = [sys.executable, str(REPO / "tests" / "training" / "two_ranks.py"), str(folder), *flags]
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment["DIFFMOE_CACHE"] = str(folder / "cache")
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Both(folder, done.stdout)


class TestTwoRanks:
    @pytest.mark.parametrize("loss", ["task loss", "own loss"])
    def test_a_loss_that_is_no_number_on_one_ends_both(self, ranks: Both, loss: str) -> None:
        first, second = ranks.found(loss)
        assert first == second
        assert first["ended"].startswith("UserError: the loss is nan at step ")
        assert first["saved"] == []

    def test_the_task_loss_is_looked_at_in_every_step(self, ranks: Both) -> None:
        assert [rank["step"] for rank in ranks.found("task loss")] == [2, 2]

    def test_the_first_ones_validation_is_what_both_go_by(self, ranks: Both) -> None:
        first, second = ranks.found("validation differs")
        assert first == second
        assert first["scores"] == [0.5, 0.6, 0.6, 0.55]  # equal is not better: two epochs without a better one
        assert (first["best"], first["epoch"], first["epochs_since_best"]) == (0.6, 4, 2)
        assert first["ended"] == "end"

    def test_a_validation_that_is_no_number_ends_both_and_nothing_is_saved(self, ranks: Both) -> None:
        first, second = ranks.found("validation is no number")
        assert first == second
        assert first["ended"] == "UserError: the loss is nan at step 3: lower --lr or raise --warmup_fraction"
        assert first["saved"] == []

    def test_a_signal_to_one_stops_both_after_the_same_step(self, ranks: Both) -> None:
        first, second = ranks.found("signal")
        assert first == second
        assert (first["ended"], first["step"], first["saved"]) == ("StopRequested: SIGTERM", 2, [2])

    def test_a_step_is_that_on_one_batch_of_all_their_pictures(self, ranks: Both) -> None:
        for windows in ranks.found("windows"):
            assert windows["off"] < 1e-6 * windows["moved"]

    def test_the_bias_moves_by_the_load_of_both(self, ranks: Both) -> None:
        first, second = ranks.found("balance")
        assert first["load"] != second["load"]
        assert first["bias"] == second["bias"] == pytest.approx(first["expected"])
        assert any(first["bias"])

    def test_what_they_ask_each_other(self, ranks: Both) -> None:
        first, second = ranks.found("helpers")
        assert first["any"] == second["any"] == [True, False, True]
        assert first["sum"] == second["sum"] == [2.0, 1.0]
        assert first["mean"] == second["mean"] == [1.0, 0.5]
        assert first["buffers"] == second["buffers"] == [1.0, 1.0]
        assert first["state"] == ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]

    def test_a_whole_run_stays_equal(self, ranks: Both, cli: Callable[..., Any], drawn: list[Path]) -> None:
        first, second = (torch.load(ranks.folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
        pairs = zip(first["model"].items(), second["model"].values(), strict=True)
        assert [name for (name, one), other in pairs if not torch.equal(one, other)] == []
        assert (first["step"], first["validation"]) == (second["step"], second["validation"])
        assert "digits: 269 training" in ranks.out
        assert ranks.out.count("epoch 2/2") == 1
        assert cli("predict", "--checkpoint", ranks.folder / "digits_model.pth", *drawn).code == 0


LOSES_ONE = """
import os, signal, sys
from diffmoe.cli import main
from diffmoe.training.objective import Trainee

step = Trainee.step

def die(trainee, *args):
    if str(trainee.fabric.global_rank) == os.environ["LOST"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainee, *args)

if "LOST" in os.environ:
    Trainee.step = die
sys.exit(main())
"""


class TestOneLine:
    """Two processes, and what goes wrong is told once."""

    @pytest.fixture
    def run_two(self, tmp_path: Path, tiny_flags: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
        (tmp_path / "two.py").write_text(LOSES_ONE)

        def call(*flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
            words = [*tiny_flags, "--epochs", 1, "--num_devices", 2, "--save_dir", tmp_path / "runs", *flags]
            script = [sys.executable, str(tmp_path / "two.py"), "train", *map(str, words)]
            told = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
            return subprocess.run(script, env=told, capture_output=True, text=True, timeout=120, check=False)

        return call

    def test_of_a_mistake_that_only_the_data_shows(self, run_two: Callable[..., Any], tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            (tmp_path / "pets/train" / name).mkdir(parents=True)
            for number in range(4):
                (tmp_path / f"pets/train/{name}/{number}.png").write_bytes(b"no picture")
        done = run_two("--dataset", tmp_path / "pets", "--img_size", 8)
        assert done.returncode == 2
        assert done.stderr.count("diffmoe: error: ") == done.stderr.count("\n") == 1
        assert "is not a picture" in done.stderr

    @pytest.mark.parametrize("lost", ["0", "1"])
    def test_of_a_process_that_was_killed(self, run_two: Callable[..., Any], lost: str) -> None:
        done = run_two(LOST=lost)
        assert done.returncode != 0
        assert done.stderr.count("\n") == 1
        assert "diffmoe: error: another of the 2 processes of this run has ended" in done.stderr


def test_more_processes_than_a_processor_makes_sense_for_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^num_devices is 1000: this machine has \d+$"):
        make_fabric(RunConfig(device="cpu", num_devices=1000))
