"""A model that has every part and computes in milliseconds; tests change what they are about."""

from __future__ import annotations

from diffmoe.config import ModelConfig

SMALL = ModelConfig(
    img_size=8,
    embed_dim=16,
    num_heads=2,
    img_encoder_layers=1,
    text_encoder_layers=1,
    fusion_layers=1,
    num_general_experts=3,
    expansion_factor=2,
    num_classes=3,
    dropout=0.0,
    vocab_size=30,
    max_text_len=8,
    text_embed_dim=8,
    use_gradient_checkpointing=False,
)
