"""The expert and attention against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from tests.model.pools import randn, randomize
from torch import Tensor, nn

from diffmoe.model.layers import Attention, Expert
from diffmoe.model.sequence import TokenSequence

WIDTH, HEADS, EPS = 8, 2, 1e-3


# --- Expert ---

FORMULAS = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: x.clamp_min(0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_expert_is_its_formula(activation: str) -> None:
    expert = randomize(Expert(WIDTH, expansion_factor=3, activation=activation, layer_norm_eps=EPS))
    x = randn(2, 5, WIDTH, seed=1)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    hidden = FORMULAS[activation](
        (normed * expert.norm.weight + expert.norm.bias) @ expert.fc1.weight.T + expert.fc1.bias
    )
    assert hidden.shape[-1] == 3 * WIDTH
    torch.testing.assert_close(expert(x), hidden @ expert.fc2.weight.T + expert.fc2.bias)


def test_expert_drops_after_the_activation_and_at_the_end() -> None:
    # Hidden units are relu(1) = 1 and fc2 is the identity. At p = 1/2 a unit survives both dropouts with probability
    # 1/4, scaled by 2 twice: 4. With only one of the two it would be 2, in half of the cases.
    expert = Expert(WIDTH, expansion_factor=1, activation="relu", dropout=0.5)
    with torch.no_grad():
        expert.fc1.weight.zero_()
        expert.fc1.bias.fill_(1)
        expert.fc2.weight.copy_(torch.eye(WIDTH))
        expert.fc2.bias.zero_()
    torch.manual_seed(0)
    y = expert(torch.randn(2000, WIDTH))
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert (y > 0).float().mean().item() == pytest.approx(1 / 4, abs=0.02)
    assert (expert.eval()(torch.randn(3, WIDTH)) == 1).all()


def test_dropout_zero_costs_no_module() -> None:
    def dropouts(p: float) -> list[nn.Dropout]:
        parts = nn.ModuleList([Expert(WIDTH, dropout=p), Attention(WIDTH, HEADS, dropout=p)])
        return [m for m in parts.modules() if isinstance(m, nn.Dropout)]

    assert not dropouts(0.0)
    assert [d.p for d in dropouts(0.3)] == [0.3] * 3


# --- Attention ---

MASK = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])  # (B, S), each row has a token


def attentions() -> dict[str, Attention]:
    return {kernel: randomize(Attention(WIDTH, HEADS, kernel=kernel)) for kernel in ("explicit", "fused", "auto")}


def attend(
    attention: Attention,
    query: Tensor,
    context: Tensor,
    mask: Tensor | None,
    causal: bool,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if query is context:
        return attention(TokenSequence(query, mask, causal), need_weights=need_weights)
    allowed = None if mask is None else mask[:, None, None]
    return attention.attend(query, *attention.keys_values(context), allowed, need_weights)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("case", ["self", "causal", "cross"])
def test_every_kernel_is_multi_head_attention(case: str, mask: Tensor | None) -> None:
    context = randn(2, 5, WIDTH, seed=1)
    query = randn(2, 3, WIDTH, seed=2) if case == "cross" else context
    causal = case == "causal"
    ours = attentions()
    one = ours["explicit"]

    reference = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    with torch.no_grad():
        assert reference.in_proj_weight is not None
        reference.in_proj_weight.copy_(torch.cat([one.query.weight, one.key_value.weight]))
        reference.in_proj_bias.copy_(torch.cat([one.query.bias, one.key_value.bias]))
        reference.out_proj.load_state_dict(one.out.state_dict())
    expected, expected_weights = reference(
        query,
        context,
        context,
        key_padding_mask=None if mask is None else ~mask,
        attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None,
        average_attn_weights=False,
    )
    for kernel, attention in ours.items():
        y, weights = attend(attention, query, context, mask, causal)
        assert weights is None
        torch.testing.assert_close(y, expected, msg=kernel)
    _, weights = attend(one, query, context, mask, causal, need_weights=True)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["explicit", "fused"])
def test_asking_for_the_weights_changes_no_output(kernel: str, causal: bool) -> None:
    x, attention = randn(2, 5, WIDTH), attentions()[kernel]
    y, weights = attention(TokenSequence(x, MASK, causal), need_weights=True)
    torch.testing.assert_close(y, attention(TokenSequence(x, MASK, causal))[0])
    assert weights is not None
    assert weights.shape == (2, HEADS, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 5, dtype=torch.float64))
    seen = MASK[:, None, None].expand(2, HEADS, 5, 5)
    assert torch.equal(weights > 0, seen.tril() if causal else seen)
