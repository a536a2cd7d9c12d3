"""The routed pool and a whole model on a GPU: the same sums, no wait for the device, one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.model.pools import by_definition, randn

from diffmoe.config import ModelConfig
from diffmoe.model.dispatch import BACKENDS, why_not
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts
from diffmoe.training.objective import Objective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIG = ModelConfig(
    img_size=16,
    in_channels=3,
    embed_dim=64,
    num_heads=2,
    img_encoder_layers=2,
    text_encoder_layers=1,
    fusion_layers=0,
    num_general_experts=8,
    vocab_size=60,
    text_embed_dim=16,
    dropout=0.1,
    balance_bias_rate=0.001,
)


def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(CONFIG, torch.randint(60, (10, 3, 6)), torch.ones(10, 3, 6, dtype=torch.int64)).cuda()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(32, 3, 16, 16, device="cuda"), torch.randint(10, (32,), device="cuda")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_is_the_gated_sum_with_its_gradients(name: str, dtype: torch.dtype) -> None:
    pool = GeneralExperts(64, 8, 2, expansion_factor=2, backend=name).cuda()
    with torch.no_grad():
        for number, parameter in enumerate(pool.parameters()):
            parameter.copy_(0.2 * randn(*parameter.shape, seed=number))
    if why_not(name, torch.empty(0, 64, dtype=dtype, device="cuda"), pool.weights):
        pytest.skip(f"{name} does not take {dtype} on this GPU")
    x = torch.randn(600, 64, device="cuda")
    mask = torch.arange(600, device="cuda") % 5 > 0
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        y, routing = pool(x, mask)
    (y.float() * x).sum().backward()
    exact = copy.deepcopy(pool).double()
    exact.zero_grad()
    normed = torch.nn.functional.layer_norm(x.double(), (64,), eps=pool.eps)
    expected = by_definition(normed, routing.expert_ids, routing.gates.double().detach(), exact.weights)
    (expected * x.double()).sum().backward()
    near = 0.05 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(y.double(), expected, rtol=near, atol=near)
    for ours, theirs in zip(pool.weights, exact.weights, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad.double() / scale, theirs.grad / scale, rtol=near, atol=near)
    assert not y[~mask].any()


def test_a_training_step_waits_for_nothing() -> None:
    objective, (images, labels) = Objective(classifier()).train(), batch()

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = objective(images, labels)
        (out.task_loss + out.own_loss).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the device raises from here on
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_training_step_is_one_graph() -> None:
    objective, (images, labels) = Objective(classifier().eval()), batch()
    compiled = torch.compile(objective, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain, fast = objective(images, labels), compiled(images, labels)
    torch.testing.assert_close(fast.task_loss, plain.task_loss, rtol=0.02, atol=0.02)


def test_losses_are_float32_under_autocast() -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = classifier().run(batch(), need_losses=True)
    assert out.losses is not None
    assert {value.dtype for value in vars(out.losses).values()} == {torch.float32}
    assert out.logits.dtype == torch.float32
