"""Where tokens went, counted by brute force; imbalance and information by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from tests.evaluation.models import block, captioner, captions, classifier, pictures, random_block

from diffmoe.config import UserError
from diffmoe.evaluation.experts import (
    BlockRouting,
    RoutingCollector,
    class_expert_counts,
    coactivation,
    favourites,
    imbalance,
    mutual_information,
    tokens_per_expert,
    trace_experts,
)
from diffmoe.evaluation.passes import run_over
from diffmoe.model.routers import AttentiveRouter
from diffmoe.model.routing import Routing


def at(trace: Iterable[BlockRouting], place: str) -> list[BlockRouting]:
    return [found for found in trace if found.place == place]


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
        found = BlockRouting.of(Routing(probs, probs, torch.ones(1, 2, 1), ids, torch.tensor([2, 0])))
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
        assert [(b.place, b.layer, tuple(b.expert_ids.shape)) for b in trace] == [
            ("image", 0, (8, 4, 2)),
            ("image", 1, (8, 4, 2)),
        ]
        images = torch.cat([images for images, _ in pictures()])
        model.eval()
        for row, image in enumerate(images):
            for found, routing in zip(trace, model.classify(image[None]).routing, strict=True):
                assert found.expert_ids[row].tolist() == routing.expert_ids[0].tolist()
                assert torch.allclose(found.gates[row], routing.gates[0], atol=1e-5)
                assert torch.allclose(found.confidence[row], routing.probs[0].amax(-1), atol=1e-5)

    def test_the_model_is_left_as_it_was(self):
        model = classifier()
        names = {name for name, _ in model.named_modules()}
        trace_experts(model, pictures())
        assert all(module.training for module in model.modules())
        assert {name for name, _ in model.named_modules()} == names

    def test_descriptions_count_once_however_many_batches(self):
        model = classifier(descriptions=True, classify_with="descriptions")
        trace = trace_experts(model, pictures())
        shapes = {(b.place, b.layer): tuple(b.expert_ids.shape[:2]) for b in trace}
        assert shapes == {("image", 0): (8, 4), ("image", 1): (8, 4), ("text", 0): (6, 6), ("fusion", 0): (8, 4)}
        assert [b.layer for b in at(trace, "image")] == [0, 1]
        with torch.inference_mode():
            classes = model.eval().class_features()
        given = RoutingCollector()
        run_over(model, pictures(), given.add, classes=classes)
        assert all(torch.equal(a.expert_ids, b.expert_ids) for a, b in zip(trace, given.blocks(), strict=True))

    def test_a_captioners_texts_are_padded_and_padding_counts_nowhere(self):
        model = captioner()
        trace = trace_experts(model, captions())
        assert [(b.place, b.layer) for b in trace] == [("image", 0), ("image", 1), ("text", 0), ("fusion", 0)]
        num_real = sum(int(mask.sum()) for _, _, mask in captions())
        for found in (*at(trace, "text"), *at(trace, "fusion")):
            assert found.expert_ids.shape == (6, 6, 2)
            assert int(found.real.sum()) == num_real
            assert int(tokens_per_expert(found).sum()) == int(coactivation(found).diagonal().sum()) == 2 * num_real
            assert int((~found.entropy.isnan()).sum()) == int((~found.confidence.isnan()).sum()) == num_real
            assert found.gates.sum(-1).round().sum() == num_real

    def test_a_dense_model_has_no_blocks(self):
        assert trace_experts(classifier(dense=True), pictures()) == ()

    def test_no_pictures(self):
        with pytest.raises(ValueError, match="no pictures"):
            trace_experts(classifier(), [])
        with pytest.raises(ValueError, match="no pictures"):
            trace_experts(captioner(), [])

    def test_a_model_that_diverged_is_said(self):
        model = captioner()
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
        found = bits, _ = mutual_information(torch.outer(torch.tensor([1, 2, 5]), torch.tensor([3, 1])))
        assert found == pytest.approx((0, 0), abs=1e-12)
        assert bits >= 0

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
