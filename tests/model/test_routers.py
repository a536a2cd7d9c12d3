"""A router's rules."""

from __future__ import annotations

import dataclasses
from math import log, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.pools import WIDTH, randn
from tests.small import SMALL
from torch import Tensor, nn

from diffmoe.model.captioner import Captioner
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.multimodal import MultiModalMoE
from diffmoe.model.routers import ROUTERS, AttentiveRouter, Router
from diffmoe.model.routing import Routing, count_tokens

few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)


@few
@given(embed_dim=st.integers(1, 80), num_experts=st.integers(1, 12))
def test_keys_start_orthonormal(embed_dim: int, num_experts: int) -> None:
    keys = AttentiveRouter(embed_dim, num_experts, 1).keys
    torch.testing.assert_close(keys @ keys.T, torch.eye(num_experts), atol=1e-5, rtol=0)


def test_logits_are_scaled_products_of_query_and_key() -> None:
    router, x = AttentiveRouter(WIDTH, 4, 2).double(), randn(5, WIDTH)
    query = router.query(x[3])
    expected = torch.stack([query @ key / sqrt(len(query)) for key in router.keys])  # over sqrt(R), as in attention
    torch.testing.assert_close(router(x).logits[3], expected)


@pytest.mark.parametrize("embed_dim", [16, 128])
def test_logits_start_with_unit_variance(embed_dim: int) -> None:
    # Of 30 routers' 4 logits each: the mean of 120 squared normals, give or take sqrt(2 / 120) = 0.13.
    torch.manual_seed(0)
    logits = torch.stack([AttentiveRouter(embed_dim, 4, 2)(torch.randn(200, embed_dim)).logits for _ in range(30)])
    assert logits.var().item() == pytest.approx(1, abs=0.3)


@few
@given(seed=seeds, num_experts=st.integers(1, 6), data=st.data())
def test_the_chosen_are_the_most_probable_and_the_gates_their_shares(
    seed: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    router = AttentiveRouter(WIDTH, num_experts, top_k).double()
    routing = router(randn(3, 5, WIDTH, seed=seed))
    best, ids = routing.probs.sort(dim=-1, descending=True)
    torch.testing.assert_close(routing.probs, routing.logits.softmax(-1))
    assert torch.equal(routing.expert_ids, ids[..., :top_k])
    if top_k == 1:  # the probability itself: over its own sum it would be 1, and the router would get no gradient
        assert torch.equal(routing.gates, best[..., :1])
    else:
        torch.testing.assert_close(routing.gates.sum(-1), torch.ones(3, 5, dtype=torch.float64))
        torch.testing.assert_close(routing.gates[..., 0] / routing.gates[..., 1], best[..., 0] / best[..., 1])


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_outside_the_experts_is_an_error_naming_both(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k is {top_k}.*4"):
        AttentiveRouter(WIDTH, 4, top_k)


def test_routing_is_float32_under_autocast() -> None:
    pool, x = GeneralExperts(WIDTH, 4, 2), torch.randn(5, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = pool(x)
    plain = pool(x)[1]
    assert y.dtype == torch.bfloat16
    for name in ("logits", "probs", "gates", "expert_ids"):
        assert torch.equal(getattr(routing, name), getattr(plain, name))


def test_noise_is_of_the_learned_spread_and_in_training_only() -> None:
    torch.manual_seed(0)
    router = AttentiveRouter(WIDTH, 4, 2, noise=True)
    x = torch.randn(5000, WIDTH)
    noisy, again = router(x).logits, router(x).logits
    router.eval()
    plain = router(x).logits
    assert torch.equal(plain, router(x).logits)
    assert not torch.equal(noisy, again)
    # The noise layer starts at zero: softplus(0) = log 2.
    assert (noisy - plain).std().item() == pytest.approx(log(2), rel=0.03)
    assert (noisy - plain).mean().item() == pytest.approx(0, abs=0.03)


def test_without_noise_training_routes_as_evaluation() -> None:
    router, x = AttentiveRouter(WIDTH, 4, 2), torch.randn(9, WIDTH)
    assert torch.equal(router.train()(x).logits, router.eval()(x).logits)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_bias_changes_the_choice_but_not_the_gates(top_k: int) -> None:
    router = AttentiveRouter(WIDTH, 4, top_k).double()
    x = randn(20, WIDTH)
    probs = router(x).probs
    router.balance_bias[2] = 1  # over any probability: everyone's first choice
    routing = router(x)
    assert torch.equal(routing.probs, probs)
    assert (routing.expert_ids[:, 0] == 2).all()
    chosen = probs.gather(-1, routing.expert_ids)
    torch.testing.assert_close(routing.gates, chosen if top_k == 1 else chosen / chosen.sum(-1, keepdim=True))


def test_the_balance_bias_moves_against_the_load() -> None:
    router = AttentiveRouter(WIDTH, 4, 1)
    router.update_balance_bias(torch.tensor([6, 2, 1, 3]), 0.1)  # the mean is 3
    torch.testing.assert_close(router.balance_bias, torch.tensor([-0.1, 0.1, 0.1, 0.0]))


def test_the_balance_bias_evens_the_load_out() -> None:
    torch.manual_seed(0)
    router = AttentiveRouter(WIDTH, 4, 1).double()
    x = randn(400, WIDTH) + 0.6 * router.keys[0].detach() @ router.query.weight.detach()  # lean to expert 0
    before = router(x).tokens_per_expert
    for _ in range(200):
        router.update_balance_bias(router(x).tokens_per_expert, 0.01)
    after = router(x).tokens_per_expert
    assert before[0] > 200

    assert after.max() < 120  # 100 each would be even


@pytest.mark.parametrize("top_k", [2, 3])
def test_gates_are_shares_where_the_probabilities_have_underflowed(top_k: int) -> None:
    # The bias picks experts whose probabilities are e^-200 and less, 0 in float32: their shares are those of e^0, e^-1.
    router = AttentiveRouter(WIDTH, 4, top_k)
    router.balance_bias.copy_(torch.tensor([0.0, 9.0, 9.0, 9.0 if top_k == 3 else 0.0]))
    routing = router.choose(torch.tensor([[0.0, -200.0, -201.0, -202.0]]), None)
    assert not routing.probs[0, 1:].any()
    expected = torch.tensor([0.0, -1.0, -2.0])[:top_k].softmax(0)
    by_id = routing.gates[0][routing.expert_ids[0].argsort()]
    torch.testing.assert_close(by_id, expected)


def test_counts_have_a_known_shape_on_any_device() -> None:
    ids = torch.tensor([[0, 2], [4, 4], [2, 1]])  # 4 is no expert
    assert count_tokens(ids, 4).tolist() == [1, 1, 2, 0]
    assert count_tokens(ids.to("meta"), 4).shape == (4,)  # without values: there is nothing to wait for


# --- The seam: another router is one class and a name ---


class ByPosition(Router):
    """Token t to the experts t, t + 1, ... modulo E, whatever it is."""

    dropless, causal = True, True

    def __init__(self, embed_dim: int, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(embed_dim, num_experts, top_k, **options)
        self.scale = nn.Parameter(torch.ones(()))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        num_experts = len(self.balance_bias)
        distance = (torch.arange(num_experts) - torch.arange(x.shape[-2])[:, None]) % num_experts
        return self.choose((-distance * self.scale).expand(*x.shape[:-1], -1), mask)


class LooksAhead(ByPosition):
    causal = False


CONFIG = dataclasses.replace(SMALL, num_general_experts=4, router="by-position")


def test_another_router_is_one_class_and_no_other_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "by-position", ByPosition)
    model = MultiModalMoE(CONFIG)
    out = model(torch.randn(3, 1, 8, 8), torch.ones(3, 5, dtype=torch.int64))
    (out["embedding"].sum() + out["router_loss"]).backward()
    assert out["routing"][0].expert_ids[0].tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert all(isinstance(router, ByPosition) for router in model.routers().values())
    assert all(p.grad is not None for name, p in model.named_parameters() if "_weight" in name)


def test_a_router_that_looks_ahead_is_a_captioners_image_towers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "by-position", LooksAhead)
    kinds = {name: type(router) for name, router in Captioner(CONFIG).backbone.routers().items()}
    assert kinds == {"image_0": LooksAhead, "text_0": AttentiveRouter, "fusion_0": AttentiveRouter}
    whole = MultiModalMoE(CONFIG)  # its texts are whole when they are read
    assert {type(router) for router in whole.routers().values()} == {LooksAhead}


def test_an_unknown_router_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"router is 'atentive': it must be one of attentive, .* \(did you mean"):
        GeneralExperts(8, 4, 2, router="atentive")
