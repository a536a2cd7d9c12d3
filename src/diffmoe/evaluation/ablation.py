"""What each expert is good for: accuracy without it. L blocks, E experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe.evaluation.classification import finite_or_told, predict
from diffmoe.model.captioner import Captioner
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.layers import evaluating
from diffmoe.model.moe import AttentiveRouter, GeneralExperts, Routing


@dataclass(frozen=True)
class Ablation:
    """What a model loses with each of its experts."""

    places: tuple[tuple[str, int], ...]
    """Of each of the L blocks, where it sits and its number there."""
    accuracy: Tensor
    """(L, E) float64, without each expert of each block; 0 to 1."""
    whole: float
    """Of the whole model, on the same pictures."""
    num_pictures: int


def ablation(model: nn.Module, make_batches: Callable[[], Iterable[Any]], **constants: Any) -> Ablation:
    """Accuracy without each expert of each block: its tokens go where the router sends them among the rest.

    One pass for each expert, so `make_batches` should give the same few hundred pictures again and again. Batches
    and `constants` are those of `trace_experts`. The accuracy is that of the class, or of a captioner's next token.
    A classifier's text tower is left out: it does not decide the class (`constants` may hold what came out of it).
    The model is left exactly as it was.

    Raises `ValueError` where there is no routing, or none to spare: as many experts as a token is sent to.
    """
    blocks = [
        block
        for block in model.modules()
        if isinstance(block, UnifiedModalEncoder) and isinstance(block.general_experts, GeneralExperts)
    ]
    blocks = [block for block in blocks if block.place != "text" or isinstance(model, Captioner)]
    if not blocks:
        raise ValueError("the model is dense: there are no experts to switch off")
    whole, num_pictures = _accuracy(model, make_batches(), constants)
    accuracy: list[list[float]] = []
    for block in blocks:
        pool = block.general_experts
        assert isinstance(pool, GeneralExperts)
        accuracy.append([])
        for expert in range(len(pool.gain)):
            with _without(pool, expert):
                accuracy[-1].append(_accuracy(model, make_batches(), constants)[0])
    places = tuple((str(block.place), block.layer) for block in blocks)
    return Ablation(places, torch.tensor(accuracy, dtype=torch.float64), whole, num_pictures)


def _accuracy(model: nn.Module, batches: Iterable[Any], constants: dict[str, Any]) -> tuple[float, int]:
    """Of the class, or of the next token; and how many pictures."""
    if not isinstance(model, Captioner):
        predictions = predict(model, batches, **constants)
        right = predictions.predicted == predictions.labels
        return right.double().mean().item(), len(right)
    total, num_targets, num_pictures = 0.0, 0, 0
    with evaluating(model), finite_or_told(), torch.inference_mode():
        for images, tokens, mask in batches:
            _, _, features = model.read(images, tokens, mask)
            count = int(mask[:, 1:].sum())
            total += model.caption_loss(features, tokens, mask)[1].item() * count
            num_targets += count
            num_pictures += len(images)
    return total / num_targets, num_pictures


@contextmanager
def _without(pool: GeneralExperts, expert: int) -> Iterator[None]:
    """Within it, the pool's router does not know this expert."""
    router = pool.router
    pool.register_module("router", _RouterOfTheRest(router, expert))
    try:
        yield
    finally:
        pool.register_module("router", router)


class _RouterOfTheRest(nn.Module):
    """A router over all experts but one, by the numbers that they have among all."""

    numbers: Tensor

    def __init__(self, router: AttentiveRouter, expert: int) -> None:
        super().__init__()
        num_experts, self.top_k = len(router.keys), router.top_k
        if self.top_k >= num_experts:
            raise ValueError(f"a token is sent to {self.top_k} of {num_experts} experts: there is none to spare")
        rest = [other for other in range(num_experts) if other != expert]
        self.router = copy.deepcopy(router)
        self.router.keys = nn.Parameter(self.router.keys.detach()[rest])
        self.router.balance_bias = self.router.balance_bias[rest]
        # The last number is no expert's: where padding goes.
        self.register_buffer("numbers", torch.tensor([*rest, num_experts], device=router.keys.device))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        routing = self.router(x, mask)
        return replace(routing, expert_ids=self.numbers[routing.expert_ids])
