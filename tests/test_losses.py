"""Each loss against a number derived by hand, and what padding, order and repetition may not change."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log, log1p
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe import losses

few = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 10**6)

BALANCED = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # two sure tokens, one to each expert: the mean is (1/2, 1/2)
COLLAPSED = torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def random_probs(seed: int, tokens: int = 6, experts: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)).softmax(-1)


def unit_rows(seed: int, rows: int, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


# --- z-loss ---


def test_z_loss_by_hand() -> None:
    assert losses.router_z_loss(BALANCED).item() == pytest.approx(1 / 2)  # 1/E
    assert losses.router_z_loss(COLLAPSED).item() == pytest.approx(1)
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]])  # means 0.7, 0.2, 0.1; squares 0.49 + 0.04 + 0.01
    assert losses.router_z_loss(probs).item() == pytest.approx(0.54)


@few
@given(seed=seeds, experts=st.integers(1, 6))
def test_z_loss_is_the_coefficient_of_variation(seed: int, experts: int) -> None:
    probs = random_probs(seed, experts=experts)
    load = probs.mean(0)
    cv = load.std(correction=0) / load.mean()
    torch.testing.assert_close(losses.router_z_loss(probs), (cv**2 + 1) / experts)


# --- load balance ---


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 5, 5, 5], 0.0),
        ([20, 0, 0, 0], log(4)),  # log E
        ([3, 3, 0], log(3 / 2)),  # 2 * 1/2 log(3/2), and 0 log 0 = 0
        ([2, 1, 1], log(9 / 8) / 2),  # 1/2 log(3/2) + 2 * 1/4 log(3/4) = 1/2 log(9/8)
    ],
)
def test_load_balance_is_the_divergence_of_the_counts_whatever_the_probabilities(
    counts: list[int], expected: float
) -> None:
    for seed in range(3):
        probs = random_probs(seed, experts=len(counts))
        assert losses.load_balance_loss(probs, torch.tensor(counts)).item() == pytest.approx(expected, abs=1e-12)


def test_load_balance_gradient_is_the_slope_of_the_counts() -> None:
    # Shares 3/4 and 1/4 of E = 2: d loss / d P_e = log(E f_e) = log 3/2, log 1/2; each of 2 tokens has half of it.
    probs = random_probs(0, tokens=2, experts=2).requires_grad_()
    losses.load_balance_loss(probs, torch.tensor([3, 1])).backward()
    expected = torch.tensor([[log(3 / 2) / 2, log(1 / 2) / 2]] * 2, dtype=torch.float64)
    torch.testing.assert_close(probs.grad, expected)


@few
@given(seed=seeds)
def test_load_balance_pushes_the_overloaded_expert_down_and_pulls_the_empty_one_up(seed: int) -> None:
    logits = random_probs(seed, experts=3).log().requires_grad_()
    losses.load_balance_loss(logits.softmax(-1), torch.tensor([9, 3, 0])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    # A descent step goes against the gradient, for every token, whatever its own choice.
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 2] < 0).all()


# --- alignment ---


def test_alignment_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert losses.cross_modal_alignment_loss(x, 3 * x).item() == pytest.approx(-1)
    assert losses.cross_modal_alignment_loss(x, -x).item() == pytest.approx(1)
    text = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # cosines 3/5 and 1
    assert losses.cross_modal_alignment_loss(x, text).item() == pytest.approx(-0.8)


# --- contrastive ---


def test_contrastive_two_by_two_by_hand() -> None:
    # Similarities [[1, 0], [0.6, 0.8]] times 5; each term is log(1 + exp(other - own)). Rows: other - own is -5 and
    # -1; columns: -2 and -4.
    image, text = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
    expected = sum(log1p(exp(-margin)) for margin in (5, 1, 2, 4)) / 4
    assert losses.contrastive_loss(image, text, torch.arange(2), 5.0).item() == pytest.approx(expected)


@few
@given(seed=seeds, pairs=st.integers(1, 6))
def test_contrastive_at_scale_zero_is_log_b(seed: int, pairs: int) -> None:
    loss = losses.contrastive_loss(unit_rows(seed, pairs), unit_rows(seed + 1, pairs), torch.arange(pairs), 0.0)
    assert loss.item() == pytest.approx(log(pairs))


@few
@given(seed=seeds)
def test_contrastive_does_not_see_the_order_of_pictures_or_texts(seed: int) -> None:
    image, text, text_of_image = unit_rows(seed, 5), unit_rows(seed + 1, 4), torch.tensor([0, 1, 1, 2, 3])
    generator = torch.Generator().manual_seed(seed)
    pictures, texts = torch.randperm(5, generator=generator), torch.randperm(4, generator=generator)
    moved = texts.argsort()[text_of_image]  # where each text went
    torch.testing.assert_close(
        losses.contrastive_loss(image[pictures], text[texts], moved[pictures], 7.0),
        losses.contrastive_loss(image, text, text_of_image, 7.0),
    )


# Pictures 0 and 1 share text 0. At scale log 2 (similarities 1 or 0) every exponential is 2 or 1:
# picture to text: own text 2 of 2 + 1, so log 3/2 each; text 0 to pictures: each of its two has 2 of 2 + 2 + 1,
# log 5/2; text 1: 2 of 1 + 1 + 2, log 2. Mean over texts: log(5) / 2.
SHARED_TEXT_LOSS = (log(3 / 2) + log(5) / 2) / 2
SHARED_IMAGE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def test_contrastive_with_several_positives_by_hand() -> None:
    loss = losses.contrastive_loss(SHARED_IMAGE, torch.eye(2), torch.tensor([0, 0, 1]), log(2))
    assert loss.item() == pytest.approx(SHARED_TEXT_LOSS)


def test_contrastive_counts_a_repeated_text_once() -> None:
    tokens = torch.tensor([[7, 8], [7, 8], [7, 9]])
    first = losses.first_occurrence(tokens)
    assert first.tolist() == [0, 0, 2]
    text = torch.eye(2)[[0, 0, 1]]
    loss = losses.contrastive_loss(SHARED_IMAGE, text, first, log(2), candidates=first == torch.arange(3))
    assert loss.item() == pytest.approx(SHARED_TEXT_LOSS)


def repeated_texts(seed: int, texts: int, length: int) -> Tensor:
    """Half of the texts are another one again, some of them another one but for a single token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (texts, length), generator=generator)
    tokens[texts // 2 :] = tokens[torch.randint(0, texts // 2, (texts - texts // 2,), generator=generator)]
    changed = torch.randint(0, texts, (texts // 4,), generator=generator)
    tokens[changed, torch.randint(0, length, changed.shape, generator=generator)] += 50
    return tokens


@few
@given(seed=seeds, texts=st.integers(1, 24), length=st.integers(1, 9), bytes_at_a_time=st.sampled_from([1, 300, 2**24]))
def test_first_occurrence_is_that_of_a_loop_however_few_columns_are_compared_at_a_time(
    seed: int, texts: int, length: int, bytes_at_a_time: int
) -> None:
    tokens = repeated_texts(seed, max(texts, 2), length)[:texts]
    rows = [tuple(row) for row in tokens.tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "COMPARED_BYTES", bytes_at_a_time)
        first = losses.first_occurrence(tokens)
    assert first.tolist() == [rows.index(row) for row in rows]
    assert first.dtype == torch.int64


class Largest(TorchDispatchMode):
    """The most bytes that any one tensor of a computation has."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return made


@pytest.mark.parametrize("texts", [64, 1000, 4096, 32768])
def test_first_occurrence_takes_a_byte_for_each_pair_and_a_bounded_part_besides(texts: int) -> None:
    """On tensors without data: so nothing is read back either, which on a GPU would wait for it."""
    tokens = torch.empty(texts, 32, dtype=torch.int64, device="meta")
    with Largest() as largest:
        losses.first_occurrence(tokens)
    pairs = texts**2  # all 32 columns of 4,096 texts at once would take 0.5 GB
    assert pairs <= largest.num_bytes <= max(pairs, losses.COMPARED_BYTES)
    assert losses.COMPARED_BYTES <= 2**26


def test_contrastive_text_without_a_picture_is_only_a_negative() -> None:
    # At scale 0: a picture finds its text among 3, the two texts that have a picture find it among 2.
    loss = losses.contrastive_loss(unit_rows(0, 2), unit_rows(1, 3), torch.tensor([0, 2]), 0.0)
    assert loss.item() == pytest.approx((log(3) + log(2)) / 2)


# --- offered besides ---


def test_logit_z_loss_by_hand() -> None:
    logits = torch.tensor([[log(1), log(3)], [0.0, 0.0]])  # logsumexp: log 4 and log 2
    assert losses.router_logit_z_loss(logits).item() == pytest.approx((log(4) ** 2 + log(2) ** 2) / 2)


def test_switch_loss_by_hand() -> None:
    assert losses.switch_loss(BALANCED, torch.tensor([1, 1])).item() == pytest.approx(1)
    assert losses.switch_loss(COLLAPSED, torch.tensor([2, 0])).item() == pytest.approx(2)  # E
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3]])  # P = (0.8, 0.2), f = (3/4, 1/4): 2 * (0.6 + 0.05)
    assert losses.switch_loss(probs, torch.tensor([3, 1])).item() == pytest.approx(1.3)


def test_entropy_losses_by_hand() -> None:
    undecided = torch.full((2, 4), 1 / 4)
    assert losses.local_entropy_loss(undecided).item() == pytest.approx(log(4))
    assert losses.local_entropy_loss(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item() == pytest.approx(log(2) / 2)
    assert losses.global_entropy_loss(BALANCED).item() == pytest.approx(-log(2))  # sure tokens, spread evenly
    assert losses.global_entropy_loss(COLLAPSED).item() == pytest.approx(0)


# --- padding ---

COUNTS = torch.tensor([4, 3, 2, 3])
ROUTER_LOSSES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "z": lambda logits, mask: losses.router_z_loss(logits.softmax(-1), mask),
    "balance": lambda logits, mask: losses.load_balance_loss(logits.softmax(-1), COUNTS, mask),
    "logit z": losses.router_logit_z_loss,
    "switch": lambda logits, mask: losses.switch_loss(logits.softmax(-1), COUNTS, mask),
    "local entropy": lambda logits, mask: losses.local_entropy_loss(logits.softmax(-1), mask),
    "global entropy": lambda logits, mask: losses.global_entropy_loss(logits.softmax(-1), mask),
}


@pytest.mark.parametrize("name", ROUTER_LOSSES)
@few
@given(seed=seeds, real=st.lists(st.booleans(), min_size=6, max_size=6).filter(any))
def test_padding_changes_no_router_loss(name: str, seed: int, real: list[bool]) -> None:
    loss, mask = ROUTER_LOSSES[name], torch.tensor(real)
    logits = random_probs(seed).log()
    alone, padded = logits[mask].requires_grad_(), logits.view(2, 3, 4).clone().requires_grad_()
    value_alone, value_padded = loss(alone, None), loss(padded, mask.view(2, 3))
    torch.testing.assert_close(value_padded, value_alone)
    value_alone.backward()
    value_padded.backward()
    assert alone.grad is not None
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad.flatten(0, 1)[mask], alone.grad)
    assert not padded.grad.flatten(0, 1)[~mask].any()


# --- guidance by super-classes ---


def test_guidance_by_hand() -> None:
    # Two pictures of two tokens. The first goes to its expert by 0.8 and 0.4, 0.6 on average; the second by 0.3.
    probs = torch.tensor([[[0.8, 0.2], [0.4, 0.6]], [[0.7, 0.3], [0.7, 0.3]]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert losses.router_guidance_loss(probs, target).item() == pytest.approx(-(log(0.6) + log(0.3)) / 2)
    # A picture that is two, by 3 to 1.
    mixed = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    expected = -(0.75 * log(0.6) + 0.25 * log(0.4))
    assert losses.router_guidance_loss(probs[:1], mixed).item() == pytest.approx(expected)


@few
@given(seed=seeds)
def test_guidance_pulls_towards_the_experts_own_share_alone(seed: int) -> None:
    logits = random_probs(seed).log()[:, None].requires_grad_()  # six pictures of one token
    target = F.one_hot(torch.arange(6) % 4, 4).double()
    losses.router_guidance_loss(logits.softmax(-1), target).backward()
    # Cross-entropy's gradient: (p - target) a picture.
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(-1) - target[:, None]) / 6)


def test_guidance_is_finite_where_a_probability_is_0() -> None:
    probs = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    loss = losses.router_guidance_loss(probs, torch.tensor([[1.0, 0.0]]))
    assert loss.isfinite()
