"""Where tokens went, counted by brute force; imbalance and information by hand; ablation that leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmoe.config import ModelConfig, UserError
from diffmoe.evaluation import predict
from diffmoe.evaluation.ablation import ablation
from diffmoe.evaluation.experts import (
    BlockRouting,
    class_expert_counts,
    coactivation,
    favourites,
    imbalance,
    mutual_information,
    tokens_per_expert,
    trace_experts,
)
from diffmoe.evaluation.history import load_history, routing_metrics
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import AttentiveRouter, GeneralExperts, Routing

SMALL = {
    "img_size": 8,
    "embed_dim": 16,
    "num_heads": 2,
    "img_encoder_layers": 2,
    "text_encoder_layers": 1,
    "fusion_layers": 1,
    "num_general_experts": 4,
    "text_embed_dim": 8,
    "vocab_size": 60,
    "max_text_len": 6,
    "num_classes": 3,
    "dropout": 0.5,
    "initializer_range": 0.3,
}


def classifier(descriptions: bool = False, **fields: Any) -> ImageClassifier:
    torch.manual_seed(0)
    tokens = torch.randint(60, (3, 2, 6)) if descriptions else None
    return ImageClassifier(ModelConfig(**{**SMALL, **fields}), tokens).train()


def cut(model: ImageClassifier, layer: int, expert: int) -> ImageClassifier:
    """A copy whose pool number `layer` never had this expert: its key, bias and weights are cut out."""
    model = copy.deepcopy(model)
    pool = [module for module in model.modules() if isinstance(module, GeneralExperts)][layer]
    rest = [other for other in range(len(pool.gain)) if other != expert]
    for name, weights in list(pool.named_parameters(recurse=False)):
        setattr(pool, name, torch.nn.Parameter(weights.detach()[rest]))
    pool.router.keys = torch.nn.Parameter(pool.router.keys.detach()[rest])
    pool.router.balance_bias = pool.router.balance_bias[rest]
    return model


def pictures(sizes: tuple[int, ...] = (5, 3)) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        yield (
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )


def many_pictures() -> Iterator[tuple[Tensor, Tensor]]:
    return pictures((140, 60))


def captions(sizes: tuple[int, ...] = (4, 2)) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches whose longest texts differ: 6 tokens, then 4."""
    generator = torch.Generator().manual_seed(2)
    for size, longest in zip(sizes, (6, 4), strict=True):
        lengths = torch.tensor([longest] + [3] * (size - 1))
        mask = (torch.arange(longest) < lengths[:, None]).long()
        yield (
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(1, 60, (size, longest), generator=generator) * mask,
            mask,
        )


def block(ids: Tensor | list[Any], num_experts: int, gates: Tensor | None = None) -> BlockRouting:
    """Of expert ids (N, T, K)."""
    ids = torch.as_tensor(ids)
    gates = torch.where(ids >= 0, 1 / ids.shape[-1], 0.0) if gates is None else gates
    blank = torch.zeros(ids.shape[:2])
    return BlockRouting("image", 0, num_experts, ids.short(), gates, blank, blank)


def random_block(num_pictures: int = 6, num_tokens: int = 5, top_k: int = 2, num_experts: int = 4) -> BlockRouting:
    """Distinct experts for each token, and some padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(num_pictures, num_tokens, num_experts, generator=generator).argsort(-1)[..., :top_k]
    ids[1, 3:] = -1
    return block(ids, num_experts)


class TestBlockRouting:
    def test_is_the_routing_with_padding_marked(self):
        router = AttentiveRouter(8, num_experts=4, top_k=2)
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        with torch.no_grad():
            routing = router(torch.randn(2, 3, 8), mask)
        found = BlockRouting.of(routing)
        assert (found.num_experts, found.top_k, found.expert_ids.shape) == (4, 2, (2, 3, 2))
        assert found.real.tolist() == mask.bool().tolist()
        for row, token in mask.nonzero().tolist():
            probs = routing.probs[row, token]
            assert found.expert_ids[row, token].tolist() == probs.topk(2).indices.tolist()
            assert found.gates[row, token].tolist() == routing.gates[row, token].tolist()
            assert found.confidence[row, token] == probs.max()
            assert found.entropy[row, token] == pytest.approx(-float((probs * probs.log()).sum()), rel=1e-5)
        assert found.expert_ids[0, 2].tolist() == [-1, -1]
        assert found.gates[0, 2].tolist() == [0, 0]
        assert found.confidence[0, 2].isnan()
        assert found.entropy[0, 2].isnan()
        assert tokens_per_expert(found).tolist() == routing.tokens_per_expert.tolist()

    def test_a_certain_router_has_no_entropy(self):
        probs = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
        ids = torch.tensor([[[0], [0]]])
        found = BlockRouting.of(Routing(probs, probs, torch.ones(1, 2, 1), ids))
        assert found.entropy.tolist() == [[0, pytest.approx(math.log(2))]]
        assert found.confidence.tolist() == [[1, 0.5]]

    def test_rows(self):
        whole = random_block()
        part = whole[torch.tensor([4, 1])]
        assert part.expert_ids.tolist() == whole.expert_ids[[4, 1]].tolist()
        assert part.real.shape == part.entropy.shape == (2, 5)
        assert whole[2:3].gates.tolist() == whole.gates[2:3].tolist()


class TestTrace:
    def test_a_classifiers_blocks_are_those_of_each_picture_alone(self):
        model = classifier()
        trace = trace_experts(model, pictures())
        assert [(b.place, b.layer, tuple(b.expert_ids.shape)) for b in trace.blocks] == [
            ("image", 0, (8, 4, 2)),
            ("image", 1, (8, 4, 2)),
        ]
        images = torch.cat([images for images, _ in pictures()])
        model.eval()
        for row, image in enumerate(images):
            for found, routing in zip(trace.blocks, model(image[None])["routing"], strict=True):
                assert found.expert_ids[row].tolist() == routing.expert_ids[0].tolist()
                assert torch.allclose(found.gates[row], routing.gates[0], atol=1e-5)
                assert torch.allclose(found.confidence[row], routing.probs[0].amax(-1), atol=1e-5)

    def test_its_predictions_are_those_of_predict(self):
        model = classifier()
        trace, alone = trace_experts(model, pictures()), predict(model, pictures())
        assert trace.predictions is not None
        assert trace.labels is not None
        assert torch.equal(trace.predictions.logits, alone.logits)
        assert torch.equal(trace.labels, alone.labels)

    def test_the_model_is_left_as_it_was(self):
        model = classifier()
        names = {name for name, _ in model.named_modules()}
        trace_experts(model, pictures())
        assert all(module.training for module in model.modules())
        assert {name for name, _ in model.named_modules()} == names

    def test_descriptions_count_once_however_many_batches(self):
        model = classifier(descriptions=True, classify_with="descriptions")
        trace = trace_experts(model, pictures())
        shapes = {(b.place, b.layer): tuple(b.expert_ids.shape[:2]) for b in trace.blocks}
        assert shapes == {("image", 0): (8, 4), ("image", 1): (8, 4), ("text", 0): (6, 6), ("fusion", 0): (8, 4)}
        assert [b.layer for b in trace.at("image")] == [0, 1]
        with torch.inference_mode():
            classes = model.eval().class_features()
        given = trace_experts(model, pictures(), classes=classes)
        assert all(torch.equal(a.expert_ids, b.expert_ids) for a, b in zip(trace.blocks, given.blocks, strict=True))

    def test_a_captioners_texts_are_padded_and_padding_counts_nowhere(self):
        model = Captioner(ModelConfig(**SMALL))
        trace = trace_experts(model, captions())
        assert (trace.labels, trace.predictions) == (None, None)
        assert [(b.place, b.layer) for b in trace.blocks] == [("image", 0), ("image", 1), ("text", 0), ("fusion", 0)]
        num_real = sum(int(mask.sum()) for _, _, mask in captions())
        for found in (*trace.at("text"), *trace.at("fusion")):
            assert found.expert_ids.shape == (6, 6, 2)
            assert int(found.real.sum()) == num_real
            assert int(tokens_per_expert(found).sum()) == int(coactivation(found).diagonal().sum()) == 2 * num_real
            assert int((~found.entropy.isnan()).sum()) == int((~found.confidence.isnan()).sum()) == num_real
            assert found.gates.sum(-1).round().sum() == num_real

    def test_a_dense_model_has_no_blocks(self):
        trace = trace_experts(classifier(dense=True), pictures())
        assert trace.blocks == ()
        assert trace.predictions is not None

    def test_no_pictures(self):
        with pytest.raises(ValueError, match="no pictures"):
            trace_experts(classifier(), [])
        with pytest.raises(ValueError, match="no pictures"):
            trace_experts(Captioner(ModelConfig(**SMALL)), [])

    def test_a_model_that_diverged_is_said(self):
        model = Captioner(ModelConfig(**SMALL))
        torch.nn.init.constant_(model.backbone.image_position, math.nan)
        with pytest.raises(UserError, match="diverged"):
            trace_experts(model, captions())


class TestImbalance:
    def test_even(self):
        assert imbalance(torch.tensor([5, 5, 5, 5])) == {
            "cv": 0,
            "max_over_mean": 1,
            "dead": 0,
            "normalized_entropy": pytest.approx(1),
        }

    def test_collapsed(self):
        found = imbalance(torch.tensor([0, 8, 0, 0]))
        # deviations from the mean 2: -2, 6, -2, -2; their mean square 12; sqrt(12) / 2 = sqrt(3)
        expected = {"cv": math.sqrt(3), "max_over_mean": 4, "dead": 3, "normalized_entropy": 0}
        assert found == pytest.approx(expected)

    def test_by_hand(self):
        found = imbalance(torch.tensor([1, 3]))
        entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
        expected = {"cv": 0.5, "max_over_mean": 1.5, "dead": 0, "normalized_entropy": entropy}
        assert found == pytest.approx(expected)

    def test_one_expert_is_even(self):
        assert imbalance(torch.tensor([7])) == {"cv": 0, "max_over_mean": 1, "dead": 0, "normalized_entropy": 1}

    def test_nothing_to_compare(self):
        with pytest.raises(ValueError, match="no token"):
            imbalance(torch.zeros(3, dtype=torch.int64))


class TestCounts:
    def test_equal_brute_force(self):
        found, labels = random_block(), torch.tensor([0, 1, 2, 0, 1, 2])
        load, by_class = torch.zeros(4).long(), torch.zeros(3, 4).long()
        together = torch.zeros(4, 4).long()
        for picture in range(6):
            for chosen in found.expert_ids[picture].tolist():
                for expert in filter(lambda e: e >= 0, chosen):
                    load[expert] += 1
                    by_class[labels[picture], expert] += 1
                    for other in chosen:
                        together[expert, other] += 1
        assert torch.equal(tokens_per_expert(found), load)
        assert torch.equal(class_expert_counts(found, labels, 3), by_class)
        assert torch.equal(coactivation(found), together)
        assert int(load.sum()) == 2 * (6 * 5 - 2)

    def test_one_expert_a_token_has_the_load_on_the_diagonal_only(self):
        found = random_block(top_k=1)
        assert torch.equal(coactivation(found), tokens_per_expert(found).diag())

    def test_an_expert_and_a_class_without_tokens_have_their_place(self):
        counts = class_expert_counts(block([[[1], [1]]], 3), torch.tensor([1]), 4)
        assert counts.tolist() == [[0, 0, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0]]

    def test_labels_must_be_one_a_picture(self):
        with pytest.raises(ValueError, match="2 labels for 6 pictures"):
            class_expert_counts(random_block(), torch.tensor([0, 1]), 2)


class TestMutualInformation:
    def test_independent(self):
        found = mutual_information(torch.outer(torch.tensor([1, 2, 5]), torch.tensor([3, 1])))
        assert found == pytest.approx((0, 0), abs=1e-12)
        assert found.bits >= 0

    def test_one_tells_the_other(self):
        assert mutual_information(7 * torch.eye(8).long()) == pytest.approx((3, 1))

    def test_the_expert_tells_half_of_the_class(self):
        # Two experts, four classes: 1 bit of 2, which is all that an expert can tell.
        counts = torch.tensor([[4, 0], [4, 0], [0, 4], [0, 4]])
        assert mutual_information(counts) == pytest.approx((1, 1))

    def test_by_hand(self):
        # p = 3/8, 1/8, 1/8, 3/8: H(class) = H(expert) = 1, H(both) = 2 * (3/8 log 8/3 + 1/8 log 8) = 1.8113 bits
        assert mutual_information(torch.tensor([[3, 1], [1, 3]])) == pytest.approx((0.18872, 0.18872), abs=1e-5)

    def test_what_never_varies_tells_nothing(self):
        assert mutual_information(torch.tensor([[3, 0], [4, 0]])) == (0, 0)

    def test_nothing_to_measure(self):
        with pytest.raises(ValueError, match="no token"):
            mutual_information(torch.zeros(2, 2))


class TestFavourites:
    GATES = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [1.0, 0.0]], [[0.7, 0.3], [0.5, 0.5]]])
    IDS = torch.tensor([[[0, 1], [1, 0]], [[0, 1], [2, 0]], [[1, 2], [2, 1]]])

    def test_best_first_and_one_of_each_picture(self):
        found = block(self.IDS, 4, self.GATES)
        assert favourites(found, 0, 5).tolist() == [[0, 0], [1, 0]]  # 0.9; 0.8, not the 0.0 beside it; none
        assert favourites(found, 1, 5).tolist() == [[2, 0], [0, 1], [1, 0]]  # 0.7, 0.6, 0.2
        assert favourites(found, 2, 1).tolist() == [[1, 1]]

    def test_none_of_a_dead_expert(self):
        assert favourites(block(self.IDS, 4, self.GATES), 3, 5).shape == (0, 2)


class TestHistory:
    def test_there_and_back(self):
        found = random_block()
        row = routing_metrics([found])
        load = tokens_per_expert(found)
        assert row["expert_load/image_0/2"] == pytest.approx(float(load[2] / load.sum()))
        assert row["router_entropy/image_0"] == 0
        rows = [{"epoch": 1.0}, {"epoch": 2.0, **row}, {"epoch": 3.0, **row}]
        ((place, (epochs, loads)),) = load_history(rows).items()
        assert (place, epochs) == (("image", 0), [2, 3])
        assert torch.allclose(loads, (load / load.sum()).expand(2, 4))
        assert load_history([{"epoch": 1.0, "lr": 0.1}]) == {}

    def test_the_mean_entropy_is_over_real_tokens(self):
        trace = trace_experts(Captioner(ModelConfig(**SMALL)), captions())
        text = trace.at("text")[0]
        mean = float(text.entropy[text.real].mean())
        assert routing_metrics(trace.blocks)["router_entropy/text_0"] == pytest.approx(mean, rel=1e-6)


class TestAblation:
    def test_equals_a_model_that_lost_the_expert(self):
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
    def test_no_token_goes_to_the_expert_and_padding_nowhere(self, top_k: int, monkeypatch: pytest.MonkeyPatch):
        model = Captioner(ModelConfig(**{**SMALL, "top_k": top_k}))
        seen: list[Tensor] = []
        dispatch = GeneralExperts.dispatch

        def spy(self: GeneralExperts, x: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
            seen.append(expert_ids)
            return dispatch(self, x, expert_ids, gates)

        monkeypatch.setattr(GeneralExperts, "dispatch", spy)
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

    def test_a_loss_free_bias_of_the_expert_does_not_bring_it_back(self):
        model = classifier()
        for module in model.modules():
            if isinstance(module, AttentiveRouter):
                module.balance_bias[2] = 5.0
        assert (tokens_per_expert(trace_experts(model, pictures()).blocks[0]) == torch.tensor([0, 0, 32, 0])).any()
        found = ablation(model, many_pictures)
        assert found.accuracy[0, 2] == accuracy(cut(model, 0, 2))

    def test_the_model_is_left_exactly_as_it_was(self):
        model = classifier()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modules, generator = list(model.modules()), torch.get_rng_state()
        ablation(model, pictures)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(module.training for module in model.modules())

    def test_and_also_when_it_is_interrupted(self):
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

    def test_the_text_tower_of_a_classifier_does_not_decide(self):
        model = classifier(descriptions=True, classify_with="descriptions")
        assert ablation(model, pictures).places == (("image", 0), ("image", 1), ("fusion", 0))

    def test_a_captioners_accuracy_is_over_real_targets(self):
        model = Captioner(ModelConfig(**SMALL)).eval()
        right = total = 0
        for images, tokens, mask in captions():
            guesses = model(images, tokens, mask)["logits"][:, :-1].argmax(-1)
            targets = mask[:, 1:].bool()
            right += int((guesses == tokens[:, 1:])[targets].sum())
            total += int(targets.sum())
        found = ablation(model, captions)
        assert found.whole == pytest.approx(right / total)
        assert found.num_pictures == 6

    def test_nothing_to_switch_off(self):
        with pytest.raises(ValueError, match="dense"):
            ablation(classifier(dense=True), pictures)
        with pytest.raises(ValueError, match="2 of 2 experts: there is none to spare"):
            ablation(classifier(num_general_experts=2), pictures)


def accuracy(model: ImageClassifier) -> float:
    predictions = predict(model, many_pictures())
    return (predictions.predicted == predictions.labels).double().mean().item()
