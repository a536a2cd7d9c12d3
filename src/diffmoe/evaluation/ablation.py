"""What each expert is good for: accuracy without it. L blocks, E experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe.evaluation.passes import Scores, run_over
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.heads import Head
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.outputs import TextFeatures
from diffmoe.model.routers import Router
from diffmoe.model.routing import Routing


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


def ablation(
    model: Head, make_batches: Callable[[], Iterable[Sequence[Tensor]]], classes: TextFeatures | None = None
) -> Ablation:
    """Accuracy without each expert of each block: its tokens go where the router sends them among the rest.

    One pass for each expert, so `make_batches` should give the same few hundred pictures again and again. The accuracy
    is that of the class, or of a captioner's next token. Blocks that decide nothing for a picture are left out.
    The model is left exactly as it was.

    Raises `ValueError` where there is no routing, or none to spare: as many experts as a token is sent to.
    """
    blocks = [
        block
        for block in model.modules()
        if isinstance(block, UnifiedModalEncoder)
        and isinstance(block.general_experts, GeneralExperts)
        and block.place in model.decides_in
    ]
    if not blocks:
        raise ValueError("the model is dense: there are no experts to switch off")

    def scores() -> Scores:
        found = Scores(model)
        run_over(model, make_batches(), found.add, classes=classes)
        return found

    whole = scores()
    accuracy: list[list[float]] = []
    for block in blocks:
        pool = block.general_experts
        assert isinstance(pool, GeneralExperts)
        accuracy.append([])
        for expert in range(len(pool.gain)):
            with _without(pool, expert):
                accuracy[-1].append(scores().accuracy)
    places = tuple((str(block.place), block.layer) for block in blocks)
    return Ablation(places, torch.tensor(accuracy, dtype=torch.float64), whole.accuracy, whole.num_pictures)


@contextmanager
def _without(pool: GeneralExperts, expert: int) -> Iterator[None]:
    """Within it, the pool's router does not know this expert."""
    router = pool.router
    pool.register_module("router", _RouterOfTheRest(router, expert))
    try:
        yield
    finally:
        pool.register_module("router", router)


class _RouterOfTheRest(Router):
    """A router over all experts but one, by the numbers that they have among all."""

    dropless, causal = True, True  # as much as the whole router is

    def __init__(self, router: Router, expert: int) -> None:
        num_experts = len(router.balance_bias)
        if router.top_k >= num_experts:
            raise ValueError(f"a token is sent to {router.top_k} of {num_experts} experts: there is none to spare")
        super().__init__(1, num_experts, router.top_k)
        self.whole = router
        self.expert = expert
        self.balance_bias = router.balance_bias.clone()
        self.balance_bias[expert] = -math.inf  # however large a bias balancing has given it

    def reset_parameters(self) -> None:
        """It has none."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """As the whole router's, without the expert's logit."""
        routing = self.whole(x, mask)
        without = torch.tensor([self.expert], device=x.device)
        return self.choose(routing.logits.index_fill(-1, without, -math.inf), mask)
