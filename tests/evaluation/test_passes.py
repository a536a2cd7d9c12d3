"""One pass serves all who collect, and what is scored is the mean over all targets, however they are batched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.evaluation.models import StubHead, answer, captioner, captions, classifier, number, pictures
from torch import Tensor
from torch.nn import functional as F

from diffmoe.config import UserError
from diffmoe.evaluation.classification import as_predictions, predict, take_predictions
from diffmoe.evaluation.experts import RoutingCollector, trace_experts
from diffmoe.evaluation.passes import Kept, Scores, finite_or_told, run_over
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import Head
from diffmoe.model.outputs import ClassifierOutput, TextFeatures


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Watched(StubHead):
    """Writes down how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def class_features(self) -> TextFeatures:
        self.calls.append(("classes", torch.is_autocast_enabled("cpu")))
        return number(1.0)

    def run(self, batch: Sequence[Tensor], *, classes: TextFeatures | None = None, **options: Any) -> ClassifierOutput:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(("run", torch.is_autocast_enabled("cpu")))
        assert classes is not None
        return answer(batch[0].flatten(1), batch[0].flatten(1) + classes.embedding)


class Watching:
    """Writes down how it is called, too, and keeps the logits."""

    def __init__(self, model: Watched) -> None:
        self.model, self.logits = model, list[Tensor]()

    def add(self, batch: Sequence[Tensor], output: ClassifierOutput) -> None:
        self.model.calls.append(("add", torch.is_autocast_enabled("cpu")))
        self.logits.append(output.logits)


class TestRunOver:
    def test_one_pass_gives_each_collector_what_it_would_get_alone(self) -> None:
        model = classifier(descriptions=True, classify_with="descriptions")
        predictions, routing = Kept(take_predictions), RoutingCollector()
        run_over(model, pictures(), predictions.add, routing.add)
        found, alone = as_predictions(predictions), predict(model, pictures())
        assert torch.equal(found.logits, alone.logits)
        assert torch.equal(found.labels, alone.labels)
        assert found.zero_shot_logits is not None
        assert alone.zero_shot_logits is not None
        assert torch.equal(found.zero_shot_logits, alone.zero_shot_logits)
        for block, other in zip(routing.blocks(), trace_experts(model, pictures()), strict=True):
            assert torch.equal(block.expert_ids, other.expert_ids)
            assert torch.equal(block.gates, other.gates)

    def test_the_model_runs_in_the_number_format_and_what_is_made_of_it_does_not(self) -> None:
        """And its classes are read once for all batches, in that format too."""
        model = Watched().train()
        run_over(model, pictures(), Watching(model).add, autocast=bfloat16)
        assert model.calls == [("classes", True), ("run", True), ("add", False), ("run", True), ("add", False)]
        assert model.training

    def test_classes_that_are_given_are_taken(self) -> None:
        model = Watched()
        watching = Watching(model)
        run_over(model, pictures(), watching.add, classes=number(5.0))
        assert "classes" not in dict(model.calls)
        images = torch.cat([images for images, _ in pictures()])
        assert torch.equal(torch.cat(watching.logits), images.flatten(1) + 5)

    def test_no_pictures(self) -> None:
        with pytest.raises(ValueError, match="there are no pictures to look at"):
            run_over(Watched(), [])

    def test_a_model_that_diverged_is_one_line_for_the_user(self) -> None:
        model = classifier().train()
        torch.nn.init.constant_(model.backbone.image_position, math.nan)
        with pytest.raises(
            UserError, match=r"the model's outputs are not finite: .* train it with a lower lr"
        ) as caught:
            run_over(model, pictures(), Scores(model).add)
        assert "\n" not in str(caught.value)
        assert model.training

    def test_a_mistake_of_the_programs_is_not_taken_for_one_of_the_users(self) -> None:
        with pytest.raises(ZeroDivisionError), finite_or_told():
            _ = 1 / 0


WRITABLE = torch.arange(0, 60, 3)
"""A third of the vocabulary: the other words are in no training caption."""


def one_by_one(batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same pictures, each alone."""
    for batch in batches:
        yield from zip(*(tensor.split(1) for tensor in batch), strict=True)


def next_tokens(model: Captioner) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """By definition, of all captions: the loss of each target that can be written and whether it was told right; and
    for each caption how many there are, and how many real tokens.
    """
    loss, right, targets, real = [], [], [], []
    model = model.eval()
    column = {token: number for number, token in enumerate(model.output_tokens.tolist())}
    for images, tokens, mask in one_by_one(captions()):
        logits = model(images, tokens, mask)["logits"][0].detach()
        following = enumerate(tokens[0, 1 : int(mask.sum())].tolist())
        found = [(t, column[token]) for t, token in following if token in column]
        loss += [-float(logits[t].log_softmax(-1)[target]) for t, target in found]
        right += [int(logits[t].argmax()) == target for t, target in found]
        targets.append(len(found))
        real.append(int(mask[:, 1:].sum()))
    return torch.tensor(loss), torch.tensor(right), targets, real


class TestScores:
    def test_of_a_captioner_each_target_that_can_be_written_counts_alike(self) -> None:
        model = captioner(WRITABLE)
        loss, right, targets, real = next_tokens(model)
        assert len(loss) == sum(targets)
        shares = [number / count for number, count in zip(targets, real, strict=True)]
        assert min(shares) < max(shares) <= 1  # weighting by real tokens would not be the same
        assert 0 < right.float().mean() < 1
        for batches in (captions(), one_by_one(captions())):
            scores = Scores(model)
            run_over(model, batches, scores.add)
            assert scores.num_targets == len(loss)
            assert scores.num_pictures == 6
            assert scores.loss == pytest.approx(float(loss.mean()), rel=1e-5)
            assert scores.accuracy == pytest.approx(float(right.float().mean()))

    def test_of_a_classifier_each_picture_counts_alike(self) -> None:
        model = classifier()
        images, labels = (torch.cat(parts) for parts in zip(*pictures(), strict=True))
        logits = predict(model, [(images, labels)]).logits
        for sizes in ([5, 3], [8], [1, 7]):
            scores = Scores(model)
            run_over(model, zip(images.split(sizes), labels.split(sizes), strict=True), scores.add)
            assert (scores.num_targets, scores.num_pictures) == (8, 8)
            assert scores.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
            assert scores.accuracy == int((logits.argmax(1) == labels).sum()) / 8  # exactly: it is a count

    def test_without_a_target_there_is_no_score(self) -> None:
        model = captioner(torch.tensor([0]))  # it can write what no caption has
        scores = Scores(model)
        run_over(model, captions(), scores.add)
        assert (scores.num_targets, scores.num_pictures) == (0, 6)
        assert math.isnan(scores.loss)
        assert math.isnan(scores.accuracy)

    @pytest.mark.parametrize("make", [lambda: captioner(WRITABLE), classifier], ids=["captioner", "classifier"])
    def test_in_bfloat16_the_loss_is_that_of_float32_within_rounding(self, make: Callable[[], Head]) -> None:
        model = make()
        plain, rounded = Scores(model), Scores(model)
        batches = list(captions() if isinstance(model, Captioner) else pictures())
        run_over(model, batches, plain.add)
        run_over(model, batches, rounded.add, autocast=bfloat16)
        assert rounded.loss == pytest.approx(plain.loss, rel=0.02)
        assert rounded.loss != plain.loss
        assert rounded.num_targets == plain.num_targets
