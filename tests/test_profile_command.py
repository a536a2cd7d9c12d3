"""`diffmoe profile`: one object whose parts add up, the files it writes, and one line for a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffmoe.checkpoint import load_model
from diffmoe.commands.profile_tables import print_profile
from diffmoe.profiling import count_parameters

SMALL = (
    *("--embed_dim", "16", "--num_heads", "2", "--img_encoder_layers", "1", "--text_encoder_layers", "1"),
    *("--text_embed_dim", "8", "--max_text_len", "8", "--batch_size", "8", "--steps", "2", "--batch_sizes", "4", "1"),
    *("--device", "cpu"),
)
Cli = Callable[..., Any]


def profiled(cli: Cli, *argv: object) -> dict[str, Any]:
    done = cli("profile", "--json", *argv)
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


def totals(found: dict[str, Any], name: str) -> float:
    return sum(cost[name] for cost in found["parts"])


@pytest.fixture(scope="module")
def checkpoint(trained: Any) -> Path:
    return trained.model


def test_a_trained_model_on_its_data(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--steps", "2", "--batch_sizes", "4", "1", "--batch_size", "8", "--test_fraction", "0.7")
    found = profiled(cli, "--checkpoint", checkpoint, "--output_dir", tmp_path, "--device", "cpu", *flags)
    model = load_model(checkpoint)
    total, active = count_parameters(model)
    assert found["parameters_total"] == total == totals(found, "parameters")
    assert found["parameters_active"] == active == totals(found, "parameters_active")
    assert found["weight_bytes"] == 4 * total
    assert found["optimizer_bytes"] >= 2 * found["weight_bytes"]  # two moments, and a step count each
    assert found["peak_bytes"] > totals(found, "held_bytes") > 0
    assert totals(found, "ms") + found["remainder_ms"] == pytest.approx(found["step_ms"])
    flops = totals(found, "forward_flops") + totals(found, "backward_flops")
    assert flops / 8 == pytest.approx(found["training_flops_per_image"], rel=0.05)  # other sentences were drawn
    for name in ("parameters", "forward_flops", "backward_flops", "ms", "held_bytes"):
        assert sum(cost[name] for cost in found["grouped"]) == pytest.approx(totals(found, name))
    assert {"data loading", "router", "dispatch", "routed experts", "global expert", "modality expert"} <= {
        cost["part"] for cost in found["parts"] if cost["ms"] > 0
    }
    assert [row["batch_size"] for row in found["throughput"]] == [1, 1, 1, 1, 4, 4, 4, 4]
    assert all(
        row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / row["ms"]) for row in found["throughput"]
    )
    assert sum("time_over_dense" in row for row in found["throughput"]) == 4
    assert found["dense"]["parameters_total"] < total
    assert found["notes"][:2] == [
        "routing: the trained router",
        "pictures: the training split of digits, loaded and augmented as in training",
    ]
    assert {Path(path).name for path in found["pictures"]} == {
        *("time.png", "memory.png", "flops.png", "throughput.png", "table.png")
    }
    assert all(Path(path).parent == tmp_path / "digits" / "profile" for path in found["pictures"])
    trace = json.loads(Path(found["trace"]).read_text(encoding="utf-8"))
    assert {"diffmoe/image/router", "diffmoe/data loading", "diffmoe/backward"} <= {
        event.get("name") for event in trace["traceEvents"]
    }


def test_a_fresh_captioner(cli: Cli, tmp_path: Path) -> None:
    found = profiled(
        cli,
        "--dataset",
        "flickr8k",
        "--output_dir",
        tmp_path,
        *SMALL,
        "--fusion_layers",
        "1",
        "--no-trace",
        "--batch_sizes",
        "1",
    )
    assert found["task"] == "captioner"
    assert found["trace"] is None
    assert "routing: a fresh router, which training changes" in found["notes"]
    assert any(note.startswith("pictures: noise") for note in found["notes"])
    assert any(note.startswith("captions: random words, 8 tokens") for note in found["notes"])
    assert "data loading" not in {cost["part"] for cost in found["parts"]}
    assert {cost["part"] for cost in found["parts"] if cost["place"] == "fusion"} >= {
        *("cross-attention", "attention", "router", "routed experts", "global expert")
    }
    [fusion] = [cost for cost in found["grouped"] if cost["part"] == "fusion"]
    assert fusion["forward_flops"] == sum(c["forward_flops"] for c in found["parts"] if c["place"] == "fusion")
    assert [path.name for path in sorted((tmp_path / "flickr8k" / "profile").iterdir())] == [
        *("flops.png", "memory.png", "table.png", "throughput.png", "time.png")
    ]


def test_a_dense_model_has_no_routing_and_no_twin(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--dataset", "cifar10", "--preset", "tiny-dense", "--output_dir", tmp_path, *SMALL, "--no-trace")
    found = profiled(cli, *flags)
    assert found["dense"] is None
    assert not {"router", "dispatch"} & {cost["part"] for cost in found["parts"]}
    assert {row["model"] for row in found["throughput"]} == {"dense"}
    assert not any(note.startswith("routing") for note in found["notes"])
    print_profile(found)
    out = capsys.readouterr().out
    assert f"{found['parameters_total']:,}" in out
    assert all(f"\n{cost['part']} " in out for cost in found["grouped"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_sizes", "0"), "batch_sizes are 0: each must be at least 1"),
        (
            ("--batch_sizes", "a"),
            "argument --batch_sizes: invalid int value: 'a'; diffmoe profile --help lists all flags",
        ),
        (("--steps", "0"), "steps is 0: it must be at least 1"),
        (("--device", "mps"), "device is 'mps': torch's profiler sees the parts on cpu and on cuda only"),
        (("--checkpoint", "nowhere.pth"), "checkpoint nowhere.pth does not exist"),
        (("--embed_dimm", "8"), "unknown flag --embed_dimm (did you mean 'embed_dim'?); --help lists all"),
        (("--batch_size", "5000"), "batch_size is 5000: digits has 1295 training pictures"),
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
    assert "was trained for another task, or other classes, than those of shapes" in done.err
    done = cli("profile", "--checkpoint", checkpoint, "--top_k", "1", "--output_dir", tmp_path)
    assert done.err.startswith("diffmoe: error: top_k is 1: the model in")
