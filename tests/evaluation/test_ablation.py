"""A model without an expert is one that never had it, and the model itself is left without a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tests.evaluation.models import accuracy, captioner, captions, classifier, many_pictures, pictures
from torch import Tensor

from diffmoe.evaluation.ablation import ablation
from diffmoe.evaluation.experts import tokens_per_expert, trace_experts
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routers import AttentiveRouter
from diffmoe.model.routing import Plan


def cut(model: ImageClassifier, layer: int, expert: int) -> ImageClassifier:
    """A copy whose pool number `layer` never had this expert: its key, bias and weights are cut out."""
    model = copy.deepcopy(model)
    pool = [module for module in model.modules() if isinstance(module, GeneralExperts)][layer]
    rest = [other for other in range(len(pool.gain)) if other != expert]
    for name, weights in list(pool.named_parameters(recurse=False)):
        setattr(pool, name, torch.nn.Parameter(weights.detach()[rest]))
    router = pool.router
    assert isinstance(router, AttentiveRouter)
    router.keys = torch.nn.Parameter(router.keys.detach()[rest])
    router.balance_bias = router.balance_bias[rest]
    return model


def test_equals_a_model_that_lost_the_expert() -> None:
    """Without expert e as in a pool where the router's key and the weights of e are cut out."""
    model = classifier()
    found = ablation(model, many_pictures)
    assert found.places == (("image", 0), ("image", 1))
    assert found.num_pictures == 200
    assert found.whole == accuracy(model)
    expected = [[accuracy(cut(model, layer, expert)) for expert in range(4)] for layer in range(2)]
    assert found.accuracy.tolist() == expected
    assert len({*expected[0], *expected[1]}) > 2  # or nothing was tested


@pytest.mark.parametrize("top_k", [1, 3])
def test_no_token_goes_to_the_expert_and_padding_nowhere(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = captioner(top_k=top_k)
    seen: list[Tensor] = []
    run = GeneralExperts.run

    def spy(self: GeneralExperts, x: Tensor, plan: Plan) -> Tensor:
        seen.append(plan.expert_ids)
        return run(self, x, plan)

    monkeypatch.setattr(GeneralExperts, "run", spy)
    found = ablation(model, lambda: list(captions())[:1])
    assert found.places == (("image", 0), ("image", 1), ("text", 0), ("fusion", 0))
    passes = [seen[start : start + 4] for start in range(0, len(seen), 4)]
    assert len(passes) == 1 + 4 * 4
    num_real = int(next(captions())[2].sum())
    for number, of_blocks in enumerate(passes[1:]):
        off, expert = divmod(number, 4)
        for place, ids in enumerate(of_blocks):
            if place == off:
                assert expert not in ids
            if place >= 2:
                assert int((ids < 4).sum()) == top_k * num_real


def test_a_loss_free_bias_of_the_expert_does_not_bring_it_back() -> None:
    model = classifier()
    for module in model.modules():
        if isinstance(module, AttentiveRouter):
            module.balance_bias[2] = 5.0
    assert (tokens_per_expert(trace_experts(model, pictures())[0]) == torch.tensor([0, 0, 32, 0])).any()
    found = ablation(model, many_pictures)
    assert found.accuracy[0, 2] == accuracy(cut(model, 0, 2))


def test_the_model_is_left_exactly_as_it_was() -> None:
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, generator = list(model.modules()), torch.get_rng_state()
    ablation(model, pictures)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())


def test_and_also_when_it_is_interrupted() -> None:
    model = classifier()
    modules, calls = list(model.modules()), []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pictures()

    with pytest.raises(KeyboardInterrupt):
        ablation(model, batches)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_the_text_tower_of_a_classifier_does_not_decide() -> None:
    model = classifier(descriptions=True, classify_with="descriptions")
    assert ablation(model, pictures).places == (("image", 0), ("image", 1), ("fusion", 0))


def test_a_captioners_accuracy_is_over_real_targets() -> None:
    model = captioner().eval()
    right = total = 0
    for images, tokens, mask in captions():
        guesses = model(images, tokens, mask)["logits"][:, :-1].argmax(-1)
        targets = mask[:, 1:].bool()
        right += int((guesses == tokens[:, 1:])[targets].sum())
        total += int(targets.sum())
    found = ablation(model, captions)
    assert found.whole == pytest.approx(right / total)
    assert found.num_pictures == 6


def test_nothing_to_switch_off() -> None:
    with pytest.raises(ValueError, match="dense"):
        ablation(classifier(dense=True), pictures)
    with pytest.raises(ValueError, match="2 of 2 experts: there is none to spare"):
        ablation(classifier(num_general_experts=2), pictures)
