"""Parameter counts by hand."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from diffmoe.config import ModelConfig
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.multimodal import MultiModalMoE
from diffmoe.model.parameters import count_parameters

TINY = ModelConfig(
    img_size=4,
    patch_size=2,
    in_channels=1,
    embed_dim=4,
    num_heads=2,
    img_encoder_layers=1,
    text_encoder_layers=1,
    fusion_layers=0,
    num_general_experts=3,
    top_k=2,
    expansion_factor=2,
    vocab_size=5,
    max_text_len=3,
    text_embed_dim=2,
)

# D = 4, F = 8, E = 3, K = 2.
EXPERT = 2 * 4 + (4 * 8 + 8) + (8 * 4 + 4)  # LayerNorm, fc1, fc2: 84
ROUTER = 4 * 4 + 3 * 4  # query D x R and E keys of R, with R = 4: 28
ATTENTION = (4 * 4 + 4) + (4 * 8 + 8) + (4 * 4 + 4)  # query, key and value, out: 80
OUTSIDE = (
    (4 * 4 + 4)  # patch embedding, 2x2 pixels to D, and its bias
    + 4 * 4  # 4 patches' positions
    + (5 * 2 + 2 * 4 + 4)  # token embedding, its projection
    + 3 * 4  # 3 text positions
    + 2 * 4  # modality embedding
    + 2 * (2 * 4)  # image_norm, text_norm
    + 2 * (4 * 4)  # projections
    + 1  # temperature
)
BLOCK = 2 * 4 + ATTENTION + EXPERT + EXPERT  # attention_norm; the global and the modality expert


def test_routed_model():
    total, active = count_parameters(MultiModalMoE(TINY))
    assert total == OUTSIDE + 2 * (BLOCK + ROUTER + 3 * EXPERT)
    assert active == OUTSIDE + 2 * (BLOCK + ROUTER + 2 * EXPERT)  # a token meets 2 of the 3


def test_dense_model_is_all_active():
    total, active = count_parameters(MultiModalMoE(dataclasses.replace(TINY, dense=True)))
    wide = 2 * 4 + (4 * 16 + 16) + (16 * 4 + 4)  # one expert of K * F hidden units
    assert total == active == OUTSIDE + 2 * (BLOCK + wide)


def test_all_experts_are_active_where_they_are_mixed():
    total, active = count_parameters(GeneralExperts(4, 3, 1, expansion_factor=2, router="merged"))
    assert total == active


@pytest.mark.parametrize("top_k", [1, 3])
def test_pool_alone(top_k):
    assert count_parameters(GeneralExperts(4, 3, top_k, expansion_factor=2)) == (
        ROUTER + 3 * EXPERT,
        ROUTER + top_k * EXPERT,
    )


def test_module_without_experts():
    assert count_parameters(nn.Linear(3, 2)) == (8, 8)
