"""What a training step costs by part: a total derived by hand, and parts that add up to the whole."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules import module as hooks

from diffmoe.config import ModelConfig, RunConfig, TrainingConfig
from diffmoe.model.captioner import Captioner
from diffmoe.model.dispatch import BACKENDS
from diffmoe.model.heads import Head, ImageClassifier
from diffmoe.model.parameters import count_parameters
from diffmoe.profiling.costs import Tracker, flop_counter, grouped, measure
from diffmoe.profiling.throughput import Batch, Contender
from diffmoe.tasks import task_of_model
from diffmoe.training.parallel import make_fabric

FIELDS: dict[str, Any] = {
    **{"img_size": 8, "patch_size": 4, "in_channels": 3, "embed_dim": 16, "num_heads": 2, "dropout": 0.0},
    **{"img_encoder_layers": 1, "text_encoder_layers": 1, "fusion_layers": 1, "num_general_experts": 2, "top_k": 2},
    **{"expansion_factor": 2, "vocab_size": 50, "max_text_len": 7, "text_embed_dim": 8, "num_classes": 3},
    **{"use_gradient_checkpointing": False, "patch_embed": "linear"},
}
ORDINARY = ("attention", "router", "routed experts", "global expert", "modality expert", "cross-attention")


def make(task: str, device: Any = "cpu", **fields: Any) -> Contender:
    """Of a classifier without or with class descriptions, or a captioner."""
    torch.manual_seed(0)
    config = ModelConfig(**(FIELDS | fields))
    tokens = torch.randint(50, (3, 2, 6)) if task == "descriptions" else None
    model: Head = Captioner(config) if task == "captioner" else ImageClassifier(config, tokens)
    return contending(model, device)


def contending(model: Head, device: Any = "cpu") -> Contender:
    run = RunConfig(device=device, precision="32-true" if device == "cpu" else "auto")  # alike on every processor
    return Contender(make_fabric(run), model, TrainingConfig())


def noise(contender: Contender, size: int) -> Batch:
    return task_of_model(contender.model).noise(contender.model, size)


def measured(contender: Contender, loads: bool = False, size: int = 4) -> tuple[dict[str, dict[str, Any]], int, Any]:
    """The rows, by place and part, of steps on one batch."""
    batch = noise(contender, size)
    rows, peak, trace = measure(contender, lambda: batch, loads, steps=1)
    return {f"{row['place']}/{row['part']}".lstrip("/"): row for row in rows}, peak, trace


def test_a_total_derived_by_hand() -> None:
    # B = 4 pictures of 8x8 are T = 4 * 4 tokens of 4x4x3 = 48 pixels; D = 16, F = 32, H = 2 heads of 8. A product
    # (m, k) x (k, n) is 2 m k n. All 16 tokens go to both experts: 16 rows each, so that no backend fills any up.
    expert = 2 * (2 * 16 * 16 * 32)  # two products for 16 rows: 32,768
    forward = {
        "patch embedding": 2 * 16 * 48 * 16,
        # Query, key, value and output, and for each picture and head (4, 8) x (8, 4) and (4, 4) x (4, 8).
        "image/attention": 4 * (2 * 16 * 16 * 16) + 4 * 2 * (2 * 4 * 8 * 4 + 2 * 4 * 4 * 8),
        "image/router": 2 * 2 * 16 * 16 + 2 * 16 * 16 * 2,  # 2 keys of 16 times the query weights; tokens times that
        "image/routed experts": 2 * expert,
        "image/global expert": expert,
        "image/modality expert": expert,
        "head": 2 * 4 * 16 * 16 + 2 * 4 * 16 * 3,  # the projection to the shared space; three classes
    }
    assert sum(forward.values()) == 196_992
    # Backward each has a product for either operand; but the pictures need no gradient, and without texts there is no
    # contrastive loss, from which the projection would have one.
    backward = {part: 2 * flops for part, flops in forward.items()}
    backward |= {"patch embedding": forward["patch embedding"], "head": 2 * (2 * 4 * 16 * 3)}
    assert sum(backward.values()) == 365_312
    parts, _, _ = measured(make("classifier"))
    assert {part: row["forward_flops"] for part, row in parts.items() if row["forward_flops"]} == forward
    assert {part: row["backward_flops"] for part, row in parts.items() if row["backward_flops"]} == backward


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("captioner", {}),
        ("captioner", {"use_gradient_checkpointing": True, "num_general_experts": 4}),
        ("captioner", {"expert_backend": "grouped"}),
        ("descriptions", {"patch_embed": "conv", "num_general_experts": 4}),
        ("descriptions", {"attention": "fused"}),
        ("descriptions", {"dense": True}),
        ("descriptions", {"classify_with": "descriptions", "use_gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_the_parts_add_up_to_the_whole(task: str, fields: dict[str, Any]) -> None:
    contender = make(task, **fields)
    before = {name: value.clone() for name, value in contender.model.state_dict().items()}
    batch = noise(contender, 4)
    torch.manual_seed(1)  # of the sentences that are drawn
    with flop_counter() as counter:
        contender.train(batch)
    torch.manual_seed(1)
    rows, peak, _ = measure(contender, lambda: batch, False, steps=1)
    assert sum(row["forward_flops"] + row["backward_flops"] for row in rows) == counter.get_total_flops() > 0
    totals = count_parameters(contender.model)
    assert (sum(r["parameters"] for r in rows), sum(r["parameters_active"] for r in rows)) == totals
    assert all(row["ms"] == row["forward_ms"] + row["backward_ms"] + row["once_ms"] for row in rows)
    assert peak > sum(row["held_bytes"] for row in rows) > 0
    for name in ("parameters", "forward_flops", "ms", "held_bytes"):
        assert sum(row[name] for row in grouped(rows)) == pytest.approx(sum(row[name] for row in rows))
    assert len({row["part"] for row in rows}) == len(grouped(rows))
    # Each gradient is work of its part, though three experts read one tensor. A fused kernel computes the scores once
    # more, and grouped experts multiply by what needs no gradient.
    exceptions = {"fused": ("attention", "cross-attention"), "grouped": ("routed experts",)}
    special = {part for value in fields.values() for part in exceptions.get(value, ())}
    for row in rows:
        if row["part"] in ORDINARY and row["part"] not in special:
            again = bool(fields.get("use_gradient_checkpointing"))
            # The last product of a block need not be computed again.
            assert 0 <= (2 + again) * row["forward_flops"] - row["backward_flops"] <= again * row["forward_flops"] / 2
            assert row["forward_ms"] > 0 < row["backward_ms"]
    changed = {name for name, value in contender.model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("running" in name or "num_batches" in name for name in changed)  # what a BatchNorm has seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_fill_products_up_are_counted_as_they_run(backend: str) -> None:
    parts, _, _ = measured(make("classifier", num_general_experts=4, top_k=1, expert_backend=backend))
    rows = parts["image/routed experts"]["forward_flops"] / (2 * 2 * 16 * 32)
    assert 16 <= rows <= 5 * 16  # of 16 tokens; `masked` runs each expert on each token, and weighs by products


def test_grouped_mm_is_counted() -> None:
    rows, stack, ends = torch.randn(16, 8), torch.randn(2, 8, 24), torch.tensor([6, 16], dtype=torch.int32)
    rows.requires_grad_()
    stack.requires_grad_()
    with flop_counter() as counter:
        torch.nn.functional.grouped_mm(rows, stack, offs=ends).square().sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 16 * 8 * 24)  # and of both gradients


def test_what_a_part_holds_derived_by_hand() -> None:
    # For 16 tokens of 16: the normalised ones, their means and deviations, 32 hidden units before and after the
    # activation, and the output, in float32.
    held = 4 * (16 * 16 + 2 * 16 + 2 * 16 * 32 + 16 * 16)
    parts, _, _ = measured(make("classifier"))
    assert parts["image/global expert"]["held_bytes"] == parts["image/modality expert"]["held_bytes"] == held
    checkpointed, _, _ = measured(make("classifier", use_gradient_checkpointing=True))
    assert checkpointed["image/global expert"]["held_bytes"] == 4 * 16 * 16  # the output alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_parts_add_up_and_the_peak_is_the_allocator_s() -> None:
    contender = make("descriptions", device="cuda", num_general_experts=4)
    batch = [part.cuda() for part in noise(contender, 8)]
    rows, peak, _ = measure(contender, lambda: batch, False, steps=3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.train(batch)
    assert peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.2)  # other sentences are drawn
    assert all(row["forward_ms"] > 0 < row["backward_ms"] for row in rows if row["part"] in ORDINARY)


def test_the_work_of_a_step_in_its_order() -> None:
    contender = make("captioner", use_gradient_checkpointing=True)
    cells: list[tuple[str, str]] = []
    batch = noise(contender, 2)
    with Tracker(contender) as tracker:
        tracker.watch = cells.append
        tracker.begin("other", "forward")
        contender.train(batch)
    passes = [which for _, which in cells]
    assert passes[-1] == "once"
    assert cells[-1][0] == "optimizer"
    backward = passes.index("backward")
    assert set(passes[backward:-1]) == {"backward"}  # what is computed again, too
    assert cells[backward - 1][0] == "outside"
    assert all(one != other for one, other in pairwise(cells))
    visits = Counter(part for part, which in cells if which == "forward")
    assert visits["cross-attention"] >= visits["image/router"] == visits["fusion/router"] == 1
    vocabulary = cells.index(("head", "forward"), cells.index(("fusion/routed experts", "forward")))
    assert cells.index(("losses", "forward"), vocabulary) > vocabulary


def test_profiling_leaves_nothing_behind() -> None:
    contender = make("captioner")
    owners = (contender.model, contender.model.backbone, contender.fabric)
    attributes = [set(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), Tracker(contender):
        _ = 1 / 0
    measured(contender)
    assert [set(vars(owner)) for owner in owners] == attributes
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_the_trace_has_the_parts(tmp_path: Path) -> None:
    parts, _, recorded = measured(make("captioner"), loads=True)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = {str(event.get("name")) for event in events}
    assert {f"diffmoe/forward/{part}" for part, row in parts.items() if row["forward_ms"]} <= names
    assert {f"diffmoe/backward/{part}" for part, row in parts.items() if row["backward_ms"]} <= names
    assert {"diffmoe/once/data loading", "diffmoe/once/optimizer"} <= names
    assert parts["data loading"]["once_ms"] > 0 < parts["optimizer"]["once_ms"]


@pytest.mark.parametrize("task", ["descriptions", "captioner"])
def test_the_dense_twin_does_the_same_active_work(task: str) -> None:
    contender = make(task, num_general_experts=4)
    dense = contender.model.like(replace(contender.model.config, dense=True))
    total, active = count_parameters(dense)
    assert total == active
    assert dense.config.dense
    _, met = count_parameters(contender.model)
    # Of each pool only the router, and of the second expert a norm and an output bias, are the routed model's own.
    pools = 3 if task == "captioner" else 2
    assert met - active == pools * (2 * 16 + 16 + 16 * 16 + 4 * 16)
    twin = contending(dense)
    batch = noise(twin, 8)
    flops = {}
    for name, one in (("moe", make(task, num_general_experts=2)), ("dense", twin)):
        with one.inference() as run, flop_counter() as counter:
            run(batch)
        flops[name] = counter.get_total_flops()
    assert flops["dense"] == pytest.approx(flops["moe"], rel=0.15)  # but for routers
