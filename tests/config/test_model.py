"""The model's defaults are the specification's, and an impossible value is one clear line."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from tests.config.mistakes import check_told

from diffmoe.config import ModelConfig, UserError

SPECIFIED = {
    "img_size": 28,
    "patch_size": 4,
    "in_channels": 1,
    "embed_dim": 512,
    "num_general_experts": 4,
    "num_modality_specific_experts": 2,
    "top_k": 2,
    "num_heads": 8,
    "img_encoder_layers": 6,
    "text_encoder_layers": 4,
    "fusion_layers": 3,
    "num_classes": 10,
    "dropout": 0.2,
    "activation": "gelu",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "position_range": 0.02,
    "use_gradient_checkpointing": True,
    "vocab_size": 50000,
    "max_text_len": 32,
    "text_embed_dim": 128,
    "router_z_loss_weight": 0.001,
    "router_balance_loss_weight": 0.01,
    "cross_modal_alignment_weight": 0.1,
    "contrastive_loss_weight": 0.1,
}
"""The specification's table."""


def test_the_defaults_are_the_specifications():
    defaults = dataclasses.asdict(ModelConfig())
    assert {name: defaults[name] for name in SPECIFIED} == SPECIFIED
    # What the specification does not have changes nothing unless asked for.
    off = ("dense", "router_noise", "balance_bias_rate", "router_guidance_weight", "switch_loss_weight")
    losses_off = ("entropy_local_weight", "entropy_global_weight", "router_logit_z_loss_weight")
    assert not any(defaults[name] for name in (*off, *losses_off))
    assert defaults["router"] == "attentive"


def test_what_is_not_given_is_the_expansion_factors():
    config = ModelConfig(expansion_factor=2, top_k=2, embed_dim=512)
    assert (config.modality_expansion, config.routed_expansion, config.dense_hidden) == (2, 2, 2 * 2 * 512)
    config = ModelConfig(modality_expansion_factor=3, routed_expansion_factor=0.5)
    assert (config.modality_expansion, config.routed_expansion, config.dense_hidden) == (3, 0.5, 512)


def test_the_twin_of_the_defaults():
    twin = ModelConfig(gate_scale=2.0).dense_twin()
    assert dataclasses.replace(twin, dense=False, dense_units=None, dense_scale=1.0) == ModelConfig(gate_scale=2.0)
    assert twin.dense_units == 2 * 2048 + 2  # two experts' hidden units, and 4 logits at half a unit each
    assert 1 < twin.dense_scale < 1.2  # a little over K unlike experts' sum, as gates are not equal


def test_a_twin_has_no_router_to_guide():
    assert ModelConfig(router_guidance_weight=0.3).dense_twin() == ModelConfig().dense_twin()


def test_configs_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().top_k = 1  # pyright: ignore[reportAttributeAccessIssue] - that is the point


IMPOSSIBLE: list[tuple[str, Any, str]] = [
    *((name, 0, "at least 1") for name in ("img_size", "patch_size", "in_channels", "embed_dim")),
    *((name, 0.0, "over 0") for name in ("modality_expansion_factor", "routed_expansion_factor")),
    *((name, bad, "over 0") for name in ("gate_scale", "dense_scale") for bad in (0.0, math.nan)),
    ("dense_units", 0, "at least 1"),
    *((name, 0, "at least 1") for name in ("num_heads", "img_encoder_layers", "text_encoder_layers")),
    *((name, 0, "at least 1") for name in ("num_general_experts", "top_k", "num_classes")),
    *((name, -1, "at least 1") for name in ("vocab_size", "text_embed_dim", "stem_width")),
    *(
        (name, -1, "at least 0")
        for name in ("fusion_layers", "initializer_range", "position_range", "balance_bias_rate")
    ),
    *((f.name, -0.1, "at least 0") for f in dataclasses.fields(ModelConfig) if "weight" in f.name),
    ("router_z_loss_weight", math.nan, "at least 0"),
    ("max_text_len", 2, "at least 3"),
    ("dropout", 1.0, "not including, 1"),
    ("dropout", -0.1, "from 0"),
    ("dropout", math.nan, "from 0"),
    ("expansion_factor", 0, "over 0"),
    ("expansion_factor", 0.0005, "over 0|at least|hidden"),  # 512 * 0.0005 = 0.256: no hidden unit
    ("expansion_factor", math.nan, "over 0"),
    ("layer_norm_eps", 0.0, "over 0"),
    ("num_modality_specific_experts", 3, "0, 1 or 2"),
    ("embed_dim", 510, r"a multiple of num_heads \(8\)"),
    ("top_k", 5, r"at most num_general_experts \(4\)"),
    ("img_size", 30, r"a multiple of patch_size \(4\)"),
]


@pytest.mark.parametrize(("name", "value", "right"), IMPOSSIBLE)
def test_impossible_value_is_one_line(name, value, right):
    check_told(ModelConfig, name, value, right)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_embed": "conv", "patch_size": 7}, "patch_size is 7.*a power of two"),
        ({"patch_embed": "whitened", "patch_size": 7}, "patch_size is 7.*a power of two over 1"),
        ({"patch_embed": "whitened", "patch_size": 1}, "patch_size is 1.*a power of two over 1"),
        ({"classify_with": "descriptions", "fusion_layers": 0}, "fusion_layers is 0.*at least 1"),
        ({"architecture": "timm", "patch_embed": "whitened"}, "patch_embed is .whitened.*.linear. with architecture"),
    ],
)
def test_impossible_together(fields, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**fields)


def test_num_patches():
    assert ModelConfig(img_size=32, patch_size=8).num_patches == 16  # 4 * 4
