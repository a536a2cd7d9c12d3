"""The routers beside the attentive one: what each promises, and that a dense twin is fair to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.model.pools import WIDTH, by_definition, randn
from torch import Tensor

from diffmoe.config import ModelConfig
from diffmoe.evaluation.experts import BlockRouting, class_expert_counts, coactivation, tokens_per_expert
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.multimodal import init_weights
from diffmoe.model.routers import ROUTERS, Router
from diffmoe.model.routing import at
from diffmoe.profiling.costs import flops_per_image

SENDING = ("attentive", "picture", "expert_choice", "hash", "random")
SEQUENCE, EXPERTS = 8, 4


def pool_of(router: str, top_k: int = 2, gate_scale: float = 1.0) -> GeneralExperts:
    """In float64, with every parameter away from zeros and ones."""
    torch.manual_seed(3)
    pool = GeneralExperts(WIDTH, EXPERTS, top_k, expansion_factor=2, router=router, gate_scale=gate_scale).double()
    with torch.no_grad():
        for number, parameter in enumerate(pool.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number))
    return pool.eval()


@pytest.mark.parametrize("router", ROUTERS)
def test_what_a_sequence_becomes_does_not_depend_on_its_batch(router: str) -> None:
    pool, x = pool_of(router), randn(5, SEQUENCE, WIDTH)
    torch.testing.assert_close(pool(x[2:3])[0], pool(x)[0][2:3])


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_changes_nothing_and_comes_out_as_zeros(router: str) -> None:
    pool, x = pool_of(router), randn(2, SEQUENCE, WIDTH)
    short = pool(x[:, :6])
    mask = torch.arange(SEQUENCE) < torch.tensor([[6], [6]])
    y, routing = pool(x, mask)
    if router != "expert_choice":  # whose experts take as many tokens as the sequence, padding included, has places for
        torch.testing.assert_close(y[:, :6], short[0])
        assert torch.equal(routing.tokens_per_expert, short[1].tokens_per_expert)
    moved = torch.where(mask[..., None], x, 7 * x.flip(1))
    torch.testing.assert_close(pool(moved, mask)[0], y)
    assert not y[:, 6:].any()


@pytest.mark.parametrize("router", SENDING)
def test_what_is_sent_is_the_gated_sum_by_definition(router: str) -> None:
    pool, x = pool_of(router, gate_scale=1.5), randn(3, SEQUENCE, WIDTH)
    y, routing = pool(x)
    normed = torch.nn.functional.layer_norm(x, (WIDTH,), eps=pool.eps)
    torch.testing.assert_close(y, by_definition(normed, routing.expert_ids, routing.gates, pool.weights))


@pytest.mark.parametrize("router", SENDING)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gates_scale(router: str, top_k: int) -> None:
    x = randn(3, SEQUENCE, WIDTH)
    plain, loud = pool_of(router, top_k)(x), pool_of(router, top_k, gate_scale=3.0)(x)
    torch.testing.assert_close(loud[0], 3 * plain[0])
    if top_k == 2 and router != "expert_choice":
        torch.testing.assert_close(loud[1].gates.sum(-1), torch.full((3, SEQUENCE), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("router", ["picture", "merged"])
def test_a_whole_picture_goes_one_way(router: str) -> None:
    _, routing = pool_of(router)(randn(6, SEQUENCE, WIDTH))
    assert (routing.expert_ids == routing.expert_ids[:, :1]).all()
    assert len(routing.expert_ids[:, 0, 0].unique()) > 1


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_expert_chooses_equally_many_of_each_picture(top_k: int) -> None:
    _, routing = pool_of("expert_choice", top_k)(randn(3, SEQUENCE, WIDTH))
    for of_picture in routing.expert_ids:
        counts = torch.bincount(of_picture.flatten(), minlength=EXPERTS + 1)[:EXPERTS]
        assert counts.tolist() == [SEQUENCE * top_k // EXPERTS] * EXPERTS
    probs = routing.probs[0, :, 1]  # expert 1 has its most probable tokens
    chosen = (routing.expert_ids[0] == 1).any(-1)
    assert probs[chosen].min() >= probs[~chosen].max() if top_k < EXPERTS else chosen.all()


def test_merged_is_the_ffn_of_the_averaged_weights() -> None:
    pool, x = pool_of("merged", gate_scale=2.0), randn(2, SEQUENCE, WIDTH)
    y, routing = pool(x)
    normed = torch.nn.functional.layer_norm(x, (WIDTH,), eps=pool.eps)
    for picture in range(2):
        share = routing.probs[picture, 0]
        gain, shift, fc1, b1, fc2, b2 = (torch.einsum("e,e...->...", share, stack) for stack in pool.weights)
        hidden = torch.nn.functional.gelu((normed[picture] * gain + shift) @ fc1.T + b1)
        torch.testing.assert_close(y[picture], 2 * (hidden @ fc2.T + b2))


def test_merged_experts_start_as_one() -> None:
    pool = GeneralExperts(WIDTH, EXPERTS, 2, router="merged")
    pool.reset_parameters(0.1)
    assert torch.equal(pool.fc1_weight, pool.fc1_weight[:1].expand_as(pool.fc1_weight))
    assert pool.fc1_weight[0].std() > 0.05


def test_soft_slots_are_means_of_tokens_and_tokens_means_of_slots() -> None:
    """Experts that all return one constant: so does the pool, whatever the weights are; they sum to 1 both ways."""
    pool, x = pool_of("soft"), randn(2, SEQUENCE, WIDTH)
    with torch.no_grad():
        pool.fc2_weight.zero_()
        pool.fc2_bias.copy_(torch.arange(WIDTH, dtype=torch.float64).expand_as(pool.fc2_bias))
    torch.testing.assert_close(pool(x)[0], torch.arange(WIDTH, dtype=torch.float64).expand(2, SEQUENCE, WIDTH))
    linear = pool_of("soft")  # one token alone: each slot is that token, and what comes out a mean over experts
    alone = randn(1, 1, WIDTH)
    normed = torch.nn.functional.layer_norm(alone, (WIDTH,), eps=linear.eps)
    y, routing = linear(alone)
    ids = torch.arange(EXPERTS).expand(1, 1, EXPERTS)
    torch.testing.assert_close(y, by_definition(normed, ids, routing.probs, linear.weights))


@pytest.mark.parametrize("router", ["hash", "random"])
def test_controls_know_nothing_of_the_token(router: str) -> None:
    pool = pool_of(router)
    first, second = pool(randn(2, SEQUENCE, WIDTH))[1], pool(randn(2, SEQUENCE, WIDTH, seed=1))[1]
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert (first.gates == 0.5).all()
    assert first.probs.unique().tolist() == [1 / EXPERTS]
    assert (pool(randn(1, 64, WIDTH))[1].tokens_per_expert > 0).all()


def test_random_draws_anew_in_training_only() -> None:
    pool, x = pool_of("random").train(), randn(4, SEQUENCE, WIDTH)
    assert not torch.equal(pool(x)[1].expert_ids, pool(x)[1].expert_ids)
    pool.eval()
    assert torch.equal(pool(x)[1].expert_ids, pool(x)[1].expert_ids)


@pytest.mark.parametrize("top_k", [1, 2])
def test_sigmoid_gates_by_hand(top_k: int) -> None:
    router = ROUTERS["attentive"](WIDTH, 3, top_k, gate="sigmoid")
    routing = router.choose(torch.tensor([[0.0, 2.0, -1.0]]), None)
    score = [0.5, 0.8808, 0.2689]  # of 0, 2 and -1
    torch.testing.assert_close(routing.probs, torch.tensor([score]) / sum(score), atol=1e-4, rtol=0)
    wanted = [score[1]] if top_k == 1 else [score[1] / (score[0] + score[1]), score[0] / (score[0] + score[1])]
    assert routing.expert_ids[0].tolist() == [1, 0][:top_k]
    torch.testing.assert_close(routing.gates, torch.tensor([wanted]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in ("hash", "random")])
def test_what_decides_and_every_expert_get_a_gradient(router: str) -> None:
    pool = pool_of(router).train()
    y, _ = pool(randn(16, SEQUENCE, WIDTH))
    y.square().sum().backward()
    for name, parameter in pool.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.flatten(1).any(1).all() if "weight" in name else parameter.grad.any(), name


CONFIG = ModelConfig(
    img_size=32,
    in_channels=3,
    embed_dim=64,
    num_heads=4,
    img_encoder_layers=1,
    num_general_experts=8,
    expansion_factor=1,
    vocab_size=50,
    dropout=0.0,
    expert_backend="sorted",
)


def picture_flops(config: ModelConfig) -> int:
    """Of a whole classifier; without the rows that only fill a product up, of which there are as many as chance has."""
    model = ImageClassifier(config)
    return flops_per_image(model, lambda size: [torch.randn(size, 3, config.img_size, config.img_size)])


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("top_k", "gate_scale"), [(1, 8.0), (2, 2.0), (4, 1.0)])
def test_a_twin_costs_what_the_counter_says_the_model_costs(router: str, top_k: int, gate_scale: float) -> None:
    config = dataclasses.replace(CONFIG, router=router, top_k=top_k, gate_scale=gate_scale)
    assert picture_flops(config) == pytest.approx(picture_flops(config.dense_twin()), rel=0.001)


@torch.no_grad()
def loudness(config: ModelConfig, x: Tensor) -> float:
    """The routed branch's standard deviation, over eight initialisations."""
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        block = UnifiedModalEncoder(config, "image")
        init_weights(block, config.initializer_range)
        for module in block.modules():
            if isinstance(module, Router):
                module.reset_parameters()
        branch = block.general_experts
        y = branch(x)[0] if isinstance(branch, GeneralExperts) else branch(x) * config.dense_scale
        found.append(y.std())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("router", ["attentive", "expert_choice", "hash", "random", "merged"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("top_k", "gate_scale"), [(1, 8.0), (2, 2.0), (4, 1.0)])
def test_a_twin_is_as_loud_at_the_start(router: str, gate: str, top_k: int, gate_scale: float) -> None:
    config = dataclasses.replace(CONFIG, router=router, gate=gate, top_k=top_k, gate_scale=gate_scale)  # type: ignore[arg-type]
    x = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0))
    assert loudness(config, x) == pytest.approx(loudness(config.dense_twin(), x), rel=0.1)


def test_what_is_counted_of_a_routing_with_empty_places() -> None:
    """Expert choice leaves places empty: in the maps, counts and pairs of the evaluation they are nobody's."""
    _, routing = pool_of("expert_choice")(randn(3, SEQUENCE, WIDTH))
    block = BlockRouting.of(at(routing, "image", 0))
    assert block.real.all()
    assert tokens_per_expert(block).tolist() == routing.tokens_per_expert.tolist()
    counts = class_expert_counts(block, torch.tensor([0, 1, 1]), 2)
    assert counts.sum(0).tolist() == routing.tokens_per_expert.tolist()
    assert coactivation(block).diagonal().tolist() == routing.tokens_per_expert.tolist()
    gates = block.gates
    assert (gates[..., :-1] >= gates[..., 1:]).all()  # best first
    assert ((block.expert_ids >= 0) == (gates > 0)).all()
