"""`diffmoe profile`: one object whose parts add up, the files it writes, and one line for a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmoe.commands.profile_tables import print_profile
from diffmoe.model.parameters import count_parameters
from diffmoe.profiling import costs
from diffmoe.storage.model_files import load_model

STEP = ("--batch_size", "8", "--steps", "2", "--batch_sizes", "4", "1", "--device", "cpu")
SMALL = (
    *("--embed_dim", "16", "--num_heads", "2", "--img_encoder_layers", "1", "--text_encoder_layers", "1"),
    *("--text_embed_dim", "8", "--max_text_len", "8", *STEP),
)
Cli = Callable[..., Any]


def profiled(cli: Cli, *argv: object) -> dict[str, Any]:
    done = cli("profile", "--json", *argv)
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


def total(found: dict[str, Any], name: str) -> float:
    return sum(row[name] for row in found["parts"])


@pytest.fixture(scope="module")
def checkpoint(trained: Any) -> Path:
    return trained.model


def test_a_trained_model_on_its_data(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    found = profiled(cli, "--checkpoint", checkpoint, "--output_dir", tmp_path, "--test_fraction", "0.7", *STEP)
    parameters, active = count_parameters(load_model(checkpoint))
    assert found["parameters_total"] == parameters == total(found, "parameters")
    assert found["parameters_active"] == active == total(found, "parameters_active")
    assert found["weight_bytes"] == 4 * parameters
    assert found["optimizer_bytes"] >= 2 * found["weight_bytes"]  # two moments, and a step count each
    assert found["peak_bytes"] > total(found, "held_bytes") > 0
    assert total(found, "ms") == pytest.approx(found["step_ms"])
    flops = total(found, "forward_flops") + total(found, "backward_flops")
    assert flops / 8 == pytest.approx(found["training_flops_per_image"], rel=0.1)  # another batch is routed otherwise
    assert found["inference_flops_per_image"] < found["training_flops_per_image"]
    for name in ("parameters", "forward_flops", "backward_flops", "ms", "held_bytes"):
        assert sum(row[name] for row in found["grouped"]) == pytest.approx(total(found, name))
    assert {"data loading", "router", "routed experts", "global expert", "modality expert", "optimizer"} <= {
        row["part"] for row in found["parts"] if row["ms"] > 0
    }
    assert [row["batch_size"] for row in found["throughput"]] == [1, 1, 1, 1, 4, 4, 4, 4]
    for row in found["throughput"]:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / row["ms"])
        assert row["time_over_dense"] > 0
    assert found["dense"]["parameters_total"] < parameters
    assert found["notes"][:2] == [
        "routing: the trained router",
        "pictures: the training split of digits, loaded and augmented as in training",
    ]
    folder = tmp_path / "digits" / "profile"
    assert sorted(folder.iterdir()) == [folder / name for name in ("costs.png", "throughput.png", "trace.json")]
    assert found["pictures"] == [str(folder / "costs.png"), str(folder / "throughput.png")]
    assert json.loads(Path(found["trace"]).read_text(encoding="utf-8"))["traceEvents"]


def test_a_fresh_captioner_on_noise(cli: Cli, tmp_path: Path) -> None:
    flags = (
        "--dataset",
        "flickr8k",
        "--fusion_layers",
        "1",
        "--no-trace",
        *SMALL,
        "--batch_sizes",
        "1",
        "--steps",
        "1",
    )
    found = profiled(cli, "--output_dir", tmp_path, *flags)
    assert found["task"] == "Captioner"
    assert found["trace"] is None
    assert found["notes"][0] == "routing: a fresh router"
    assert found["notes"][1].startswith("pictures, labels, captions: noise")
    parts = {(row["place"], row["part"]) for row in found["parts"]}
    assert not any(part == "data loading" for _, part in parts)
    assert {("", "cross-attention"), ("fusion", "attention"), ("fusion", "router"), ("text", "router")} <= parts
    folder = tmp_path / "flickr8k" / "profile"
    assert sorted(folder.iterdir()) == [folder / "costs.png", folder / "throughput.png"]


def test_a_dense_model_has_no_routing_and_no_twin(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--dataset", "cifar10", "--preset", "tiny-dense", "--output_dir", tmp_path, *SMALL, "--no-trace")
    found = profiled(cli, *flags)
    assert found["dense"] is None
    assert "router" not in {row["part"] for row in found["parts"]}
    assert {row["model"] for row in found["throughput"]} == {"dense"}
    assert not any(note.startswith("routing") for note in found["notes"])
    print_profile(found)
    out = capsys.readouterr().out
    assert all(f"\n{row['part']} " in out for row in found["grouped"])
    assert all(path in out for path in found["pictures"])
    assert " 100.0%\n" in out


def test_a_classifier_that_reads_descriptions(cli: Cli, tmp_path: Path) -> None:
    flags = ("--classify_with", "descriptions", "--fusion_layers", "1", "--use_gradient_checkpointing", "true")
    found = profiled(cli, "--output_dir", tmp_path, *SMALL, *flags, "--batch_sizes", "1", "--steps", "1", "--no-trace")
    [cross] = [row for row in found["parts"] if row["part"] == "cross-attention"]
    assert cross["backward_flops"] == 3 * cross["forward_flops"]  # both gradients, and the forward pass once more


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_sizes", "0"), "batch_sizes are 0: each must be at least 1"),
        (("--batch_sizes", "a"), "argument --batch_sizes: invalid int value: 'a'"),
        (("--steps", "0"), "steps is 0: it must be at least 1"),
        (("--device", "mps"), "device is 'mps'"),
        (("--device", "cpu", "--num_devices", "2"), "device is 'cpu', num_devices 2: profile takes one, cpu or cuda"),
        (("--checkpoint", "nowhere.pth"), "checkpoint nowhere.pth does not exist"),
        (("--embed_dimm", "8"), "unknown flag --embed_dimm (did you mean 'embed_dim'?); --help lists all"),
        (("--batch_size", "5000"), "a batch of 5000 is asked for: digits has 1295 training pictures"),
        (("--batch_sizes", "1", "2000"), "a batch of 2000 is asked for: digits has 1295 training pictures"),
        (("--dataset", "nowhere"), "dataset is 'nowhere'"),
        (("--dataset", "flickr8k", "--fusion_layers", "0"), "fusion_layers is 0: captions need at least 1"),
        (("--vocab_size", "9"), "vocab_size is 9: the tokenizer needs at least 49408"),
    ],
)
def test_a_mistake_is_one_line(cli: Cli, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    done = cli("profile", "--output_dir", tmp_path, *flags)
    assert done.code == 2
    assert done.err.startswith(f"diffmoe: error: {message}")
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_task(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli("profile", "--checkpoint", checkpoint, "--dataset", "shapes", "--output_dir", tmp_path)
    assert done.code == 2
    assert "was trained for another task or other classes than shapes's" in done.err
    done = cli("profile", "--checkpoint", checkpoint, "--top_k", "1", "--output_dir", tmp_path)
    assert done.err.startswith("diffmoe: error: top_k is 1: the model in")


def test_a_fault_of_the_profile_is_not_taken_for_a_file_that_cannot_be_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("a worker died")

    monkeypatch.setattr(costs, "measure", fails)
    with pytest.raises(OSError, match="a worker died"):
        cli("profile", "--output_dir", tmp_path, *SMALL)


def test_a_trace_that_cannot_be_written_is_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "digits" / "profile" / "trace.json").mkdir(parents=True)
    done = cli("profile", "--output_dir", tmp_path, *SMALL, "--batch_sizes", "1", "--steps", "1")
    assert done.code == 2
    assert "trace.json cannot be written" in done.err
    assert done.err.count("\n") == 1
