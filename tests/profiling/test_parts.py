"""Every module and every parameter is of one part."""

from __future__ import annotations

import dataclasses

import pytest
from tests.small import SMALL

from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.profiling.parts import METHODS, ORDER, count_by_part, module_parts

CONFIG = dataclasses.replace(SMALL, expansion_factor=4, vocab_size=50, num_classes=5)


@pytest.mark.parametrize("kind", [Captioner, ImageClassifier])
def test_every_module_is_of_one_part(kind: type) -> None:
    model = kind(CONFIG)
    found = list(module_parts(model))
    assert [module for module, _ in found] == list(model.modules())
    assert all(part.rpartition("/")[2] in ORDER for _, part in found)
    assert all(name.rpartition("/")[2] in ORDER for name in METHODS.values())


def test_the_parts_are_where_they_are() -> None:
    model = Captioner(CONFIG)
    parts = dict(module_parts(model))
    block, layer = model.backbone.image_encoder.blocks[0], model.backbone.fusion.layers[0]  # pyright: ignore
    assert parts[model.backbone.patch_embed.projection] == "patch embedding"
    assert parts[model.backbone.token_projection] == "text embedding"
    assert parts[block.attention.query] == parts[block.attention_norm] == "image/attention"  # pyright: ignore
    assert parts[block.general_experts] == "image/routed experts"  # pyright: ignore
    assert parts[block.general_experts.router] == "image/router"  # pyright: ignore
    assert parts[block.modality_expert.fc1] == "image/modality expert"  # pyright: ignore
    assert parts[block] == "image/other"
    assert parts[layer.cross_attention.out] == parts[layer.query_norm] == "cross-attention"  # pyright: ignore
    assert parts[layer.block.attention] == "fusion/attention"  # pyright: ignore
    assert parts[layer.block.global_expert.norm] == "fusion/global expert"  # pyright: ignore
    assert parts[model.output_projection] == parts[model.backbone.text_projection] == "head"
    assert parts[model.backbone.image_norm] == parts[model.backbone] == "other"


def test_parameters_by_part() -> None:
    counts = count_by_part(ImageClassifier(CONFIG))
    expert = 2 * 16 + (16 * 64 + 64) + (64 * 16 + 16)  # norm, D to 4 D, and back
    assert counts["image/global expert"] == counts["text/modality expert"] == (expert, expert)
    assert counts["image/routed experts"] == (3 * expert, 2 * expert)  # a token meets 2 of the 3
    assert counts["head"] == (2 * 16 * 16 + 16 * 5 + 5,) * 2
    assert not any(part.startswith("fusion") for part in counts)  # a head that reads none has none
    captioner = count_by_part(Captioner(CONFIG))
    assert captioner["head"] == (2 * 16 * 16 + 16 * 8 + 8 + 50,) * 2
