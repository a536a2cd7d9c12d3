"""The closed-form count of FLOPs against torch's counter, which watches the products run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffmoe.config import ModelConfig
from diffmoe.model.captioner import Captioner
from diffmoe.model.dispatch import BACKENDS
from diffmoe.model.heads import ImageClassifier
from diffmoe.objectives import CaptionObjective, ClassificationObjective
from diffmoe.profiling.flops import Flops, count_flops
from diffmoe.profiling.parts import POOL, Part, module_parts
from diffmoe.profiling.work import Work, observe

Head = ImageClassifier | Captioner
FIELDS: dict[str, Any] = {
    **{"img_size": 8, "patch_size": 4, "in_channels": 3, "embed_dim": 16, "num_heads": 2, "dropout": 0.0},
    **{"img_encoder_layers": 2, "text_encoder_layers": 1, "fusion_layers": 1, "num_general_experts": 4},
    **{"expansion_factor": 1.5, "vocab_size": 50, "max_text_len": 7, "text_embed_dim": 8, "num_classes": 3},
    "use_gradient_checkpointing": False,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"dense": True},
    {"patch_embed": "conv"},
    {"patch_embed": "conv", "patch_size": 1},
    {"classify_with": "descriptions", "fusion_layers": 2},
    {"use_gradient_checkpointing": True},
    {"use_gradient_checkpointing": True, "dropout": 0.1},
    {"expert_backend": "sorted"},
    {"expert_backend": "masked"},
    {"attention": "fused"},
    {"router_noise": True, "switch_loss_weight": 0.1, "entropy_local_weight": 0.1, "router_logit_z_loss_weight": 0.1},
    {"num_modality_specific_experts": 1, "entropy_global_weight": 0.1},
]


def make(task: str, texts: Sequence[int], **fields: Any) -> tuple[Head, tuple[Tensor, ...]]:
    """A model and 5 pictures; `texts` are the lengths of 6 descriptions, or the first 5 of captions."""
    torch.manual_seed(0)
    config = ModelConfig(**(FIELDS | fields))
    images = torch.randn(5, config.in_channels, config.img_size, config.img_size)
    tokens = torch.randint(50, (6, 6))
    mask = (torch.arange(6) < torch.tensor(texts)[:, None]).long()
    if task == "captioner":
        return Captioner(config, torch.arange(0, 50, 2)), (images, tokens[:5], mask[:5])
    model = ImageClassifier(config, tokens.view(3, 2, 6), mask.view(3, 2, 6))
    return model, (images, torch.tensor([0, 2, 1, 1, 0]))


def watch(model: Head, batch: tuple[Tensor, ...], training: bool) -> tuple[int, int, dict[Part, Flops], Any]:
    """FLOPs that torch saw forward and backward, the hand count of the same step, and torch's count by module."""
    seen: list[dict[str, Any]] = []
    handle = model.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    model.train(training)
    objective: Any = CaptionObjective(model) if isinstance(model, Captioner) else ClassificationObjective(model)
    with torch.set_grad_enabled(training):
        classes = model.class_features() if isinstance(model, ImageClassifier) and not training else None
        with FlopCounterMode(display=False) as counter:
            if training:
                loss = objective(*batch)[0]
                forward = counter.get_total_flops()
                loss.backward()
            else:
                model(*batch) if classes is None else model(batch[0], classes=classes)
                forward = counter.get_total_flops()
        backward = counter.get_total_flops() - forward
    handle.remove()
    counts = count_flops(model.config, observe(model, batch, seen[0], training))
    return forward, backward, counts, counter.get_flop_counts()


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("task", ["classifier", "captioner"])
@pytest.mark.parametrize("texts", [(4, 5, 6, 3, 6, 2), (6,) * 6], ids=["ragged", "full"])
def test_every_product_is_counted_exactly(task: str, texts: tuple[int, ...], fields: dict[str, Any]) -> None:
    model, batch = make(task, texts, **fields)
    forward, backward, counts, _ = watch(model, batch, training=True)
    assert sum(c.forward + c.padding_forward for c in counts.values()) == forward
    assert sum(c.backward + c.padding_backward for c in counts.values()) == backward
    assert forward > 0 < backward


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("task", ["classifier", "captioner"])
def test_inference_is_counted_exactly(task: str, fields: dict[str, Any]) -> None:
    model, batch = make(task, (4, 5, 6, 3, 6, 2), **fields)
    forward, _, counts, _ = watch(model, batch, training=False)
    assert sum(c.forward + c.padding_forward for c in counts.values()) == forward
    assert all(c.backward == c.padding_backward == 0 for c in counts.values())


@pytest.mark.parametrize("fields", [{"expert_backend": "sorted"}, {"dense": True}, {"patch_embed": "conv"}], ids=str)
@pytest.mark.parametrize("task", ["classifier", "captioner"])
def test_each_part_has_its_own_products(task: str, fields: dict[str, Any]) -> None:
    model, batch = make(task, (4, 5, 6, 3, 6, 2), **fields)
    # Forward alone: backward torch cannot always tell whose a product is.
    _, _, counts, by_module = watch(model, batch, training=False)
    # Torch's count of a module includes its children: a part has what its module has beyond the parts inside it.
    starts = {name: part for name, _, part in module_parts(model)}
    total = {name: _of_module(by_module, name) for name in starts}
    expected: dict[Part, int] = defaultdict(int)
    for name, part in starts.items():
        inner = [other for other in starts if other.startswith(f"{name}.")]
        nearest = [n for n in inner if not any(n.startswith(f"{other}.") for other in inner)]
        own = Part(part.place, "routed experts" if part.name == POOL else part.name)
        expected[own] += total[name] - sum(total[child] for child in nearest)
    found = {part: count.forward + count.padding_forward for part, count in counts.items()}
    for part in [part for part in found if part.name == "dispatch"]:  # by products, inside the pool's module
        expected[Part(part.place, "routed experts")] -= found[part]
    compared = {part for part in expected if part in found and part.name != "head"}  # the logits are no module
    assert {part: found[part] for part in compared} == {part: expected[part] for part in compared}
    assert len(compared) >= 4


def _of_module(by_module: Any, name: str) -> int:
    keys = [key for key in by_module if key.endswith(f".{name}")]
    return sum(sum(by_module[key].values()) for key in keys)


def test_a_count_derived_by_hand() -> None:
    fields: dict[str, Any] = FIELDS | {"top_k": 1, "img_encoder_layers": 1}
    config = ModelConfig(**fields)
    counts = count_flops(config, Work("classifier", pictures=5, training=True, backends={"image": "sorted"}))
    tokens, width, hidden = 5 * 4, 16, 24  # 8x8 pixels are 4 patches of 4x4
    assert counts[Part("image", "patch embedding")].forward == 2 * tokens * (3 * 4 * 4) * width
    assert counts[Part("image", "patch embedding")].backward == 2 * tokens * (3 * 4 * 4) * width  # of the weights only
    projections = 4 * (2 * tokens * width * width)  # query, key, value, output
    scores = 2 * (5 * 2) * (2 * 4 * 4 * 8)  # 5 pictures x 2 heads: (4, 8) x (8, 4), and back
    assert counts[Part("image", "attention")].forward == projections + scores
    assert counts[Part("image", "attention")].backward == 2 * (projections + scores)
    # Each token against 4 experts; the 4 keys (of 16) times the query's weights once.
    assert counts[Part("image", "router")].forward == 2 * tokens * width * 4 + 2 * 4 * 16 * width
    assert counts[Part("image", "routed experts")].forward == 2 * (2 * tokens * width * hidden)
    assert counts[Part("", "head")].forward == 2 * 5 * width * width + 2 * 5 * width * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_are_counted_by_the_slots_routed_and_padding_apart(backend: str) -> None:
    model, batch = make("captioner", (4, 5, 6, 3, 6, 2), expert_backend=backend)
    out = model(*batch)
    work = observe(model, batch, out, training=True)
    counts = count_flops(model.config, work)
    slots = 2 * (4 + 5 + 6 + 3 + 6)  # top-2 of the real words, whatever the backend
    assert counts[Part("text", "routed experts")].forward == 2 * (2 * slots * 16 * 24)
    [routing] = [routing for routing in out["routing"] if routing.place == "text"]
    load = routing.tokens_per_expert.tolist()
    rows = {
        "sorted": sum(-(-count // 16) * 16 for count in load),
        "padded": 4 * -(-max(load) // 16) * 16,
        "grouped": 2 * 5 * 6,  # the padding's slots go along
        "masked": 4 * 5 * 6,  # each expert on each token
    }[backend]
    assert work.padding_rows["text"] == rows - slots
    assert counts[Part("text", "routed experts")].padding_forward == 2 * 2 * (rows - slots) * 16 * 24
    assert counts[Part("text", "routed experts")].padding_backward == 2 * (2 * 2 * (rows - slots) * 16 * 24)
