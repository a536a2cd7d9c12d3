"""Time and memory by part: nothing is changed, each operation is its part's, and the parts add up to the step."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile, record_function

from diffmoe.config import ModelConfig, RunConfig, TrainingConfig
from diffmoe.hardware import make_fabric
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.profiling import timing
from diffmoe.profiling.parts import LOADING, OPTIMIZER, Part
from diffmoe.profiling.ranges import BACKWARD, STEP, label, part_of_label, ranges
from diffmoe.profiling.throughput import Contender, Speed, race, ratio
from diffmoe.profiling.timing import by_cell, held_bytes, measure, split_steps

CPU = torch.device("cpu")
FIELDS: dict[str, Any] = {
    **{"img_size": 8, "patch_size": 4, "in_channels": 3, "embed_dim": 16, "num_heads": 2, "dropout": 0.0},
    **{"img_encoder_layers": 1, "text_encoder_layers": 1, "fusion_layers": 1, "num_general_experts": 4},
    **{"vocab_size": 50, "max_text_len": 7, "text_embed_dim": 8, "num_classes": 3, "expert_backend": "sorted"},
    "use_gradient_checkpointing": False,
}


def contender(task: str = "classifier", **fields: Any) -> tuple[Contender, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    config = ModelConfig(**(FIELDS | fields))
    images, tokens = torch.randn(6, 3, 8, 8), torch.randint(50, (6, 6))
    fabric = make_fabric(RunConfig(device="cpu"))
    if task == "captioner":
        return Contender(Captioner(config), TrainingConfig(), fabric), (images, tokens, torch.ones_like(tokens))
    model = ImageClassifier(config, tokens.view(3, 2, 6))
    return Contender(model, TrainingConfig(), fabric), (images, torch.tensor([0, 2, 1, 1, 0, 2]))


def recorded(task: str, memory: bool = False, **fields: Any) -> list[list[Any]]:
    """The events of two steps."""
    moe, batch = contender(task, **fields)
    with ranges(moe.model, moe.objective, moe.fabric):
        moe.train(batch)
        with profile(profile_memory=memory) as profiler:
            for _ in range(2):
                with record_function(STEP):
                    moe.train(batch)
    return split_steps(profiler.events() or [])


def test_a_label_names_its_part() -> None:
    for part in (Part("image", "routed experts"), Part("fusion", "cross-attention"), LOADING):
        assert part_of_label(label(part)) == part
    assert part_of_label(STEP) is part_of_label(BACKWARD) is part_of_label("aten::mm") is None


@pytest.mark.parametrize("task", ["classifier", "captioner"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_parts_of_a_step_add_up_to_the_step(task: str, checkpointing: bool) -> None:
    for events in recorded(task, use_gradient_checkpointing=checkpointing):
        assert events[0].name == STEP
        whole = events[0].time_range.elapsed_us() / 1000
        assert sum(by_cell(events, CPU).values()) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("task", ["classifier", "captioner"])
def test_a_node_of_the_backward_pass_is_the_part_s_that_made_it(task: str) -> None:
    nodes: dict[str, set[Part]] = defaultdict(set)
    count: dict[Part, int] = defaultdict(int)
    for event, (part, which) in timing._owners(recorded(task, attention="explicit")[1]):
        if event.name.startswith(timing.NODE):
            assert which == "backward"
            nodes[event.name.removeprefix(timing.NODE)].add(part)
            count[part] += event.name.endswith(("AddmmBackward0", "MmBackward0"))
    places = {"image", "text"} | ({"fusion"} if task == "captioner" else set())
    assert nodes["_RunExpertsBackward"] == {Part(place, "routed experts") for place in places}
    assert nodes["_GatherBackward"] == nodes["_CombineBackward"] == {Part(place, "dispatch") for place in places}
    assert nodes["ConvolutionBackward0"] == {Part("image", "patch embedding")}
    assert nodes["EmbeddingBackward0"] == {Part("text", "text embedding")}
    assert nodes["BmmBackward0"] == {Part(place, "attention") for place in places} | (
        {Part("fusion", "cross-attention")} if task == "captioner" else set()
    )
    assert all(count[Part(place, "attention")] == 3 for place in places)  # query, key and value, out
    assert count[Part("image", "global expert")] == count[Part("image", "modality expert")] == 2
    if task == "captioner":  # picture and text for the contrast, the projection before the vocabulary, and its product
        assert count[Part("", "head")] == 4


def test_what_is_computed_again_is_of_the_backward_pass() -> None:
    ran = [
        which
        for event, (part, which) in timing._owners(recorded("classifier", use_gradient_checkpointing=True)[1])
        if event.name == "_RunExperts" and part.place == "image"
    ]
    assert ran == ["forward", "backward"]


def test_the_optimizer_has_its_step_and_the_clipping() -> None:
    names = {event.name for event, (part, _) in timing._owners(recorded("classifier")[1]) if part == OPTIMIZER}
    assert "aten::_fused_adamw_" in names
    assert label(OPTIMIZER) in names


@pytest.mark.parametrize("task", ["classifier", "captioner"])
def test_what_the_parts_hold_adds_up_to_what_is_allocated_before_the_backward_pass(task: str) -> None:
    events = recorded(task, memory=True)[1]
    held = held_bytes(events, CPU)
    model_range = next(event for event in events if event.name == label(Part("", "losses")))
    assert sum(held.values()) == pytest.approx(model_range.cpu_memory_usage, rel=0.02)  # and a few scalars
    checkpointed = held_bytes(recorded(task, memory=True, use_gradient_checkpointing=True)[1], CPU)
    assert checkpointed.get(Part("image", "routed experts"), 0) < held[Part("image", "routed experts")] / 2


def test_profiling_leaves_nothing_behind() -> None:
    moe, batch = contender("captioner")
    before = {name: value.clone() for name, value in moe.model.state_dict().items()}
    attributes = set(vars(moe.model)) | set(vars(moe.model.backbone)) | set(vars(moe.fabric))
    with torch.no_grad():
        expected = moe.objective(*batch)[0]
        with ranges(moe.model, moe.objective, moe.fabric):
            assert torch.equal(moe.objective(*batch)[0], expected)
    with pytest.raises(ZeroDivisionError), ranges(moe.model, moe.objective, moe.fabric):
        _ = 1 / 0
    assert set(vars(moe.model)) | set(vars(moe.model.backbone)) | set(vars(moe.fabric)) == attributes
    for module in moe.objective.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    moe.train(batch)  # at the rate 0
    assert all(torch.equal(value, before[name]) for name, value in moe.model.state_dict().items())


def test_measured_steps_and_a_trace_that_has_the_parts(tmp_path: Path) -> None:
    moe, batch = contender("captioner")
    with ranges(moe.model, moe.objective, moe.fabric):
        moe.train(batch)
        measured = measure(lambda: moe.train(batch), 3, CPU, tmp_path / "trace.json")
    parts = {part for part, _ in measured.ms}
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count(STEP) == names.count(BACKWARD) == 2
    ranged = {part for name in names if (part := part_of_label(str(name))) is not None}
    pooled = {Part(place, "routed pool") for place in ("image", "text", "fusion")}
    inside = {Part(place, name) for place, _ in pooled for name in ("routed experts", "dispatch")}
    assert ranged - pooled == parts - inside
    assert pooled <= ranged
    assert inside <= parts
    assert all(value > 0 for (part, which), value in measured.ms.items() if which == "forward")
    assert sum(measured.held_bytes.values()) < measured.peak_bytes < 2**24


class Fake:
    """A contender that notes its turns and takes a known time."""

    def __init__(self, name: str, turns: list[tuple[str, str, float]], clock: list[float], seconds: float) -> None:
        self.name, self.turns, self.clock, self.seconds = name, turns, clock, seconds
        self.model = torch.nn.Linear(1, 1)

    def train(self, batch: tuple[torch.Tensor]) -> None:
        self.clock[0] += self.seconds
        self.turns.append((self.name, "training", float(batch[0])))

    def infer(self, batch: tuple[torch.Tensor], classes: None) -> None:
        self.clock[0] += self.seconds / 2
        self.turns.append((self.name, "inference", float(batch[0])))


def test_a_race_is_by_turns_on_the_same_new_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, str, float]] = []
    clock, drawn = [0.0], iter(range(100))
    monkeypatch.setattr("diffmoe.profiling.throughput.time.perf_counter", lambda: clock[0])
    fakes: Any = {name: Fake(name, turns, clock, seconds) for name, seconds in (("moe", 3.0), ("dense", 2.0))}
    speeds = list(race(fakes, [4], lambda size: (torch.tensor(float(next(drawn))),), rounds=2))
    assert [(s.model, s.mode, s.seconds) for s in speeds] == [
        ("moe", "inference", (1.5, 1.5)),
        ("dense", "inference", (1.0, 1.0)),
        ("moe", "training", (3.0, 3.0)),
        ("dense", "training", (2.0, 2.0)),
    ]
    assert speeds[2].images_per_second == 4 / 3
    assert ratio(speeds[2], speeds[3]) == 1.5
    # A turn is two steps; the first round of a mode warms up; who begins changes.
    assert [(name, number) for name, mode, number in turns if mode == "training"] == [
        *[("moe", 6), ("moe", 7), ("dense", 6), ("dense", 7)],
        *[("dense", 8), ("dense", 9), ("moe", 8), ("moe", 9)],
        *[("moe", 10), ("moe", 11), ("dense", 10), ("dense", 11)],
    ]


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    fast, slow = (Speed(name, "training", 8, seconds) for name, seconds in (("a", (1, 9, 2)), ("b", (1, 3, 4))))
    assert ratio(fast, slow) == 1  # of 1, 3 and 1/2; the medians' own ratio is 2/3
