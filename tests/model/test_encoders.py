"""Blocks, towers and the fusion: what each is built of, causality, checkpointing, the dense baseline."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.small import SMALL
from torch import Tensor, nn

from diffmoe.config import ModelConfig
from diffmoe.model import dispatch
from diffmoe.model.encoders import CrossModalFusion, Encoded, ImageEncoder, Place, TextEncoder, UnifiedModalEncoder
from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.multimodal import init_weights
from diffmoe.model.parameters import count_parameters
from diffmoe.model.sequence import Context, KeyValues, TokenSequence

WIDTH, WIDE = 16, 64
CONFIG = dataclasses.replace(
    SMALL, embed_dim=WIDTH, img_encoder_layers=2, text_encoder_layers=2, fusion_layers=2, num_general_experts=4
)
MASK = torch.arange(6) < torch.tensor([[6], [4]])  # (B, N): padding on the right of the second row


def config(**changes: Any) -> ModelConfig:
    return dataclasses.replace(CONFIG, **changes)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(kind: type[nn.Module], *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args)


# --- Block ---


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("place", ["image", "text", "fusion"])
def test_a_block_builds_only_the_modality_expert_of_its_place(place: Place, number: int) -> None:
    block = UnifiedModalEncoder(config(num_modality_specific_experts=number), place)
    # Vision is the first modality to get an expert, text the second, and the fusion has no modality of its own.
    has_own = {"image": number >= 1, "text": number >= 2, "fusion": False}[place]
    assert (block.modality_expert is not None) == has_own
    assert sum(isinstance(m, Expert) for m in block.modules()) == 1 + has_own


@pytest.mark.parametrize("place", ["image", "fusion"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_block_is_attention_then_the_sum_of_its_experts(place: Place, dense: bool) -> None:
    block = seeded(UnifiedModalEncoder, config(dense=dense), place, 3)
    x = randn(2, 6, WIDTH)
    y, routing, _ = block(TokenSequence(x, MASK))
    attended = x + block.attention(TokenSequence(block.attention_norm(x), MASK))[0]
    pool = block.general_experts
    expected = attended + block.global_expert(attended) + (pool(attended) if dense else pool(attended, MASK)[0])
    if place == "image":
        expected = expected + block.modality_expert(attended)
    torch.testing.assert_close(y, expected)
    assert (routing is None) == dense
    if routing is not None:
        assert (routing.place, routing.layer) == (place, 3)


# --- Dense baseline ---


@pytest.mark.parametrize("expansion_factor", [4, 0.5, 1.3])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_dense_has_no_routing_and_the_active_parameters_of_the_pool(top_k: int, expansion_factor: float) -> None:
    # K experts of hidden width F are K (2 D F + F + D) weights and biases, and K norms of 2 D. One expert of width K F
    # has 2 D K F + K F + D, and one norm of 2 D: 3 D (K - 1) fewer. The router comes on top of the routed pool.
    routed = UnifiedModalEncoder(config(top_k=top_k, expansion_factor=expansion_factor), "fusion")
    dense = UnifiedModalEncoder(config(top_k=top_k, expansion_factor=expansion_factor, dense=True), "fusion")
    assert isinstance(routed.general_experts, GeneralExperts)
    router = count_parameters(routed.general_experts.router)[0]
    assert count_parameters(routed)[1] - router - count_parameters(dense)[0] == 3 * WIDTH * (top_k - 1)
    assert not any(isinstance(m, GeneralExperts) for m in dense.modules())


def test_a_dense_stack_returns_no_routing() -> None:
    x = randn(2, 6, WIDTH)
    assert ImageEncoder(config(dense=True))(TokenSequence(x)).routing == ()
    assert CrossModalFusion(config(dense=True))(TokenSequence(x), Context(x)).routing == ()


# --- Causality ---


def run(stack: nn.Module, x: Tensor) -> Encoded:
    """The text tower on x, or the fusion in which x reads some pictures, causally."""
    if isinstance(stack, CrossModalFusion):
        return stack(TokenSequence(x, causal=True), Context(randn(len(x), 5, x.shape[-1], seed=9)))
    return stack(TokenSequence(x, causal=True))


STACKS = pytest.mark.parametrize("kind", [TextEncoder, CrossModalFusion])


@STACKS
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("few_slots", [-1, 10**9], ids=["sorted", "padded"])
def test_no_token_sees_the_future_to_the_last_bit(
    kind: type[nn.Module], few_slots: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the changed tokens' experts: an expert that gets another number of rows must round alike. Weights large
    # enough that no residual hides the last bit.
    monkeypatch.setattr(dispatch, "FEW_SLOTS", few_slots)
    stack = seeded(kind, config(embed_dim=WIDE, top_k=top_k))
    init_weights(stack, 0.2)
    for seed in range(5):
        x = randn(2, 8, WIDE, seed=seed)
        y = run(stack, x).features
        for t in range(1, 8):
            changed = x.clone()
            changed[0, t:] = randn(8 - t, WIDE, seed=100 + seed)
            y_changed = run(stack, changed).features
            assert torch.equal(y_changed[:, :t], y[:, :t]), f"position {t}, seed {seed}"
            assert torch.equal(y_changed[1], y[1]), f"the other text, seed {seed}"
            assert not torch.equal(y_changed[0, t:], y[0, t:])


@STACKS
def test_no_gradient_comes_from_the_future(kind: type[nn.Module]) -> None:
    stack = seeded(kind, config())
    for t in range(1, 8):
        x = randn(2, 8, WIDTH).requires_grad_()
        (gradient,) = torch.autograd.grad(run(stack, x).features[:, :t].square().sum(), x)
        assert not gradient[:, t:].any()
        assert gradient[:, :t].flatten(2).any(-1).all()


def test_a_causal_query_sees_the_whole_context_and_only_the_real_part_of_it() -> None:
    fusion = seeded(CrossModalFusion, config())
    query, context = randn(2, 4, WIDTH), randn(2, 6, WIDTH, seed=1).requires_grad_()
    first_token = fusion(TokenSequence(query, causal=True), Context(context, MASK)).features[:, 0]
    (gradient,) = torch.autograd.grad(first_token.square().sum(), context)
    assert torch.equal(gradient.any(-1), MASK)


def test_the_image_tower_sees_everything() -> None:
    x = randn(1, 6, WIDTH).requires_grad_()
    features = seeded(ImageEncoder, config())(TokenSequence(x)).features
    (gradient,) = torch.autograd.grad(features[0, 0].square().sum(), x)
    assert gradient.any(-1).all()


def test_a_past_that_is_too_short_for_the_stack_is_an_error() -> None:
    stack = seeded(TextEncoder, config())
    with torch.no_grad(), pytest.raises(IndexError):
        stack(TokenSequence(randn(1, 1, WIDTH), causal=True, past=[KeyValues(8)]))


# --- Attention maps ---


def test_attention_maps_come_on_request_in_order_and_change_nothing() -> None:
    fusion = seeded(CrossModalFusion, config())
    query, context = TokenSequence(randn(2, 4, WIDTH)), Context(randn(2, 6, WIDTH, seed=1))
    plain, drawn = fusion(query, context), fusion(query, context, need_weights=True)
    assert plain.attention == ()
    torch.testing.assert_close(drawn.features, plain.features)
    assert [(m.place, m.layer, m.cross) for m in drawn.attention] == [
        ("fusion", 0, True),
        ("fusion", 0, False),
        ("fusion", 1, True),
        ("fusion", 1, False),
    ]
    for attention in drawn.attention:
        assert attention.weights.shape == (2, 2, 4, 6 if attention.cross else 4)
        torch.testing.assert_close(attention.weights.sum(-1), torch.ones(2, 2, 4))


# --- Gradient checkpointing ---


@STACKS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_neither_outputs_nor_gradients_nor_counts(kind: type[nn.Module], dropout: float) -> None:
    def step(checkpointing: bool) -> tuple[Encoded, list[Tensor]]:
        stack = seeded(kind, config(dropout=dropout, router_noise=True, use_gradient_checkpointing=checkpointing))
        torch.manual_seed(1)
        encoded = run(stack, randn(2, 6, WIDTH))
        probs = sum(r.probs.square().mean() for r in encoded.routing)  # the losses read the routing, too
        (encoded.features.square().mean() + probs).backward()
        return encoded, [p.grad for p in stack.parameters() if p.grad is not None]

    (kept, gradients), (recomputed, gradients_recomputed) = step(False), step(True)
    assert torch.equal(recomputed.features, kept.features)
    assert len(gradients) > 20
    assert len(gradients_recomputed) == len(gradients)
    for gradient, again in zip(gradients, gradients_recomputed, strict=True):
        assert torch.equal(again, gradient)
    assert len(recomputed.routing) == 2
    for routing, again in zip(kept.routing, recomputed.routing, strict=True):
        assert torch.equal(again.tokens_per_expert, routing.tokens_per_expert)
        assert again.tokens_per_expert.sum() == 2 * 6 * CONFIG.top_k  # not doubled


@STACKS
def test_checkpointing_computes_each_block_again_in_training_only(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    forward = GeneralExperts.forward

    def counted(self: GeneralExperts, *args: Any) -> Any:
        calls.append("")
        return forward(self, *args)

    monkeypatch.setattr(GeneralExperts, "forward", counted)
    stack = seeded(kind, config(use_gradient_checkpointing=True))
    for training, passes in ((True, 2), (False, 1)):
        calls.clear()
        run(stack.train(training), randn(2, 6, WIDTH).requires_grad_()).features.sum().backward()
        assert len(calls) == 2 * passes  # of 2 blocks


# --- Compiling ---


@pytest.mark.parametrize("place", ["image", "text"])
def test_a_compiled_block_is_one_graph_with_the_same_step(place: Place) -> None:
    block = seeded(UnifiedModalEncoder, config(), place)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")  # raises where the graph would break
    mask = MASK if place == "text" else None
    results = []
    for run_block in (block, compiled):
        x = randn(2, 6, WIDTH).requires_grad_()
        y, routing, _ = run_block(TokenSequence(x, mask, causal=place == "text"))
        inputs = (x, *block.parameters())
        gradients = torch.autograd.grad(y.square().sum() + routing.probs[..., 0].sum(), inputs)
        results.append((y, routing.tokens_per_expert, gradients))
    torch.testing.assert_close(results[1], results[0])
