"""Metrics against numbers derived by hand, and the laws that `predict` keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.evaluation.models import StubHead, answer
from torch import Tensor, nn

from diffmoe.config import UserError
from diffmoe.evaluation.classification import (
    Predictions,
    averaged_accuracy,
    calibration_bins,
    calibration_error,
    classification_metrics,
    fit_temperature,
    pick_examples,
    predict,
)
from diffmoe.model.outputs import ClassifierOutput

# Softmax of a log-probability is the probability, so every number below can be derived by hand.
HAND_MADE = Predictions(
    logits=torch.tensor(
        [
            [0.70, 0.20, 0.10],  # true 0, predicted 0
            [0.10, 0.62, 0.28],  # true 0, predicted 1
            [0.20, 0.70, 0.10],  # true 1, predicted 1
            [0.50, 0.30, 0.20],  # true 2, predicted 0
            [0.42, 0.33, 0.25],  # true 2, predicted 0
        ]
    ).log(),
    labels=torch.tensor([0, 0, 1, 2, 2]),
)


def random_predictions(num_classes: int = 7, count: int = 200, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    logits = torch.randn(count, num_classes, generator=generator)
    logits[torch.arange(count), labels] += 1
    return Predictions(logits, labels, torch.randn(count, num_classes, generator=generator))


class TestMetrics:
    def test_hand_derived(self):
        metrics = classification_metrics(HAND_MADE, 3)
        assert metrics["accuracy"] == pytest.approx(2 / 5)
        assert metrics["top5_accuracy"] == 1  # the top 3 of 3
        assert metrics["precision"] == pytest.approx([1 / 3, 1 / 2, 0])  # class 2 is never predicted
        assert metrics["recall"] == pytest.approx([1 / 2, 1, 0])
        assert metrics["confusion_matrix"] == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]
        # -ln of the true class's probability: (0.3567 + 2.3026 + 0.3567 + 1.6094 + 1.3863) / 5
        assert metrics["nll"] == pytest.approx(1.20234, abs=1e-4)
        # Bins of 1/15: the two at 0.7 share one, |1 - 0.7| · 2/5 = 0.12; the wrong ones are alone, each with its
        # confidence as the gap: (0.62 + 0.50 + 0.42) / 5 = 0.308.
        assert metrics["ece"] == pytest.approx(0.428, abs=1e-5)
        assert "zero_shot_accuracy" not in metrics

    def test_accuracy_counts_pictures_not_classes(self):
        # 3 of 4 pictures are right; the mean over the two classes' recalls would be 1/2.
        predictions = Predictions(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
        assert classification_metrics(predictions, 2)["accuracy"] == 0.75

    def test_top5_counts_rank_5_but_not_rank_6(self):
        descending = torch.arange(6, 0, -1.0).expand(2, 6)
        metrics = classification_metrics(Predictions(descending, torch.tensor([4, 5])), 6)
        assert (metrics["accuracy"], metrics["top5_accuracy"]) == (0, 0.5)

    def test_perfect_classifier(self):
        labels = torch.arange(4).repeat(3)
        metrics = classification_metrics(Predictions(50 * torch.eye(4)[labels], labels), 4)
        assert metrics["accuracy"] == metrics["top5_accuracy"] == 1
        assert metrics["precision"] == metrics["recall"] == [1] * 4
        assert metrics["confusion_matrix"] == (3 * torch.eye(4)).tolist()
        assert metrics["ece"] == pytest.approx(0, abs=1e-6)
        assert metrics["nll"] == pytest.approx(0, abs=1e-6)

    def test_constant_classifier_is_right_as_often_as_its_class_occurs(self):
        labels = torch.tensor([0, 1, 2, 2, 2, 1, 0, 0])
        metrics = classification_metrics(Predictions(torch.tensor([[0.0, 0.0, 3.0]]).expand(8, 3), labels), 3)
        assert metrics["accuracy"] == 3 / 8
        assert metrics["precision"] == [0, 0, 3 / 8]
        assert metrics["recall"] == [0, 0, 1]

    def test_zero_shot_is_the_accuracy_of_its_own_logits(self):
        predictions = Predictions(HAND_MADE.logits, HAND_MADE.labels, torch.eye(3)[torch.tensor([0, 0, 1, 2, 0])])
        metrics = classification_metrics(predictions, 3)
        assert metrics["zero_shot_accuracy"] == pytest.approx(4 / 5)
        assert metrics["accuracy"] == pytest.approx(2 / 5)

    def test_order_of_pictures_does_not_matter(self):
        p = random_predictions()
        order = torch.randperm(len(p.labels), generator=torch.Generator().manual_seed(1))
        assert p.zero_shot_logits is not None
        shuffled = Predictions(p.logits[order], p.labels[order], p.zero_shot_logits[order])
        before, after = classification_metrics(p, 7), classification_metrics(shuffled, 7)
        assert before.keys() == after.keys()
        for key in before.keys() - {"confusion_matrix"}:
            assert after[key] == pytest.approx(before[key], abs=1e-6), key
        assert after["confusion_matrix"] == before["confusion_matrix"]

    def test_renaming_the_classes_renames_the_metrics(self):
        p = random_predictions()
        new_of_old = torch.randperm(7, generator=torch.Generator().manual_seed(2))
        old_of_new = new_of_old.argsort()
        renamed = Predictions(p.logits[:, old_of_new], new_of_old[p.labels])
        before, after = classification_metrics(p, 7), classification_metrics(renamed, 7)
        for key in ("accuracy", "top5_accuracy", "ece", "nll"):
            assert after[key] == pytest.approx(before[key], abs=1e-6), key
        for key in ("precision", "recall"):
            torch.testing.assert_close(torch.tensor(after[key]), torch.tensor(before[key])[old_of_new])
        confusion = torch.tensor(before["confusion_matrix"])
        assert torch.equal(torch.tensor(after["confusion_matrix"]), confusion[old_of_new][:, old_of_new])

    def test_json_holds_them(self):
        metrics = classification_metrics(random_predictions(), 7)
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics

    @pytest.mark.parametrize("num_classes", [1, 2, 4])
    def test_wrong_number_of_classes(self, num_classes: int):
        with pytest.raises(ValueError, match=r"num_classes|number of classes"):
            classification_metrics(HAND_MADE, num_classes)


class TestCalibration:
    def test_certainty_belongs_to_the_last_bin(self):
        # Confidences of exactly 1 (wrong) and of 0.96 (right) are both in the bin from 14/15:
        # accuracy 1/2, confidence 0.98, so the error is 0.48.
        probabilities = torch.tensor([[1.0, 0.0], [0.96, 0.04]])
        predictions = Predictions(probabilities.clamp(min=1e-30).log(), torch.tensor([1, 0]))
        assert predictions.probabilities[0, 0] == 1
        assert calibration_error(predictions) == pytest.approx(0.48, abs=1e-6)

    def test_bins_hold_every_prediction_and_sum_to_the_error(self):
        predictions = random_predictions(count=500)
        binned = calibration_bins(predictions)
        assert binned.count.sum() == 500
        gaps = (binned.accuracy - binned.confidence).abs() * binned.count / 500
        assert gaps.nansum().item() == pytest.approx(calibration_error(predictions), abs=1e-6)
        filled = binned.count > 0
        edges = torch.linspace(0, 1, 16)
        assert (binned.confidence[filled] >= edges[:-1][filled]).all()
        assert (binned.confidence[filled] <= edges[1:][filled]).all()
        assert binned.accuracy[~filled].isnan().all()


class TestTemperature:
    @pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
    def test_finds_the_one_by_which_the_answers_were_drawn(self, true: float) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(20_000, 5, generator=generator)
        labels = (logits / true).softmax(1).multinomial(1, generator=generator)[:, 0]
        found = fit_temperature(Predictions(logits, labels))
        assert found == pytest.approx(true, rel=0.05)
        calibrated = Predictions(logits / found, labels)
        assert calibration_error(calibrated) < 0.015
        assert torch.equal(calibrated.predicted, logits.argmax(1))

    def test_no_other_fits_better(self) -> None:
        made = random_predictions()
        found = fit_temperature(made)

        def nll(temperature: float) -> float:
            return nn.functional.cross_entropy(made.logits / temperature, made.labels).item()

        assert all(nll(found) <= nll(found * factor) for factor in (0.9, 0.99, 1.01, 1.1))

    def test_is_within_limits_where_all_are_right(self) -> None:
        labels = torch.arange(100) % 4
        sure = Predictions(nn.functional.one_hot(labels, 4).float(), labels)
        assert fit_temperature(sure) == pytest.approx(0.25, rel=0.01)

    def test_is_1_of_too_few_and_of_what_is_no_number(self) -> None:
        assert fit_temperature(HAND_MADE) == 1
        assert fit_temperature(Predictions(torch.full((100, 3), torch.nan), torch.zeros(100).long())) == 1


class TinyModel(StubHead):
    """Depends on the mode (dropout, batch norm), so that a forgotten `eval()` shows."""

    def __init__(self, zero_shot: bool = False):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.zero_shot = zero_shot

    def run(self, batch: Sequence[Tensor], **_: Any) -> ClassifierOutput:
        features = self.trunk(batch[0])
        return answer(features, self.head(features), features[:, :3] if self.zero_shot else None)


@pytest.fixture
def model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(zero_shot=True)


def batches_of(size: int, count: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    images = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(count) % 3
    return zip(images.split(size), labels.split(size), strict=True)


class TestPredict:
    def test_batch_size_does_not_matter(self, model: TinyModel):
        one_by_one, together, ragged = (predict(model, batches_of(size)) for size in (1, 64, 10))
        for other in (together, ragged):
            torch.testing.assert_close(one_by_one.logits, other.logits)
            torch.testing.assert_close(one_by_one.zero_shot_logits, other.zero_shot_logits)
            assert torch.equal(one_by_one.labels, other.labels)

    def test_deterministic(self, model: TinyModel):
        first, second = predict(model, batches_of(8)), predict(model, batches_of(8))
        assert torch.equal(first.logits, second.logits)

    def test_leaves_the_model_as_it_was(self, model: TinyModel):
        model.train()
        model.trunk.eval()  # as one who freezes a part does
        modes = [module.training for module in model.modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        predict(model, batches_of(8))
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_restores_the_mode_after_an_error(self, model: TinyModel):
        with pytest.raises(RuntimeError):
            predict(model, [(torch.zeros(1, 5), torch.zeros(1))])
        assert model.training

    def test_results_are_ordinary_float32(self, model: TinyModel):
        predictions = predict(model.bfloat16(), ((x.bfloat16(), y) for x, y in batches_of(8)))
        assert predictions.logits.dtype == torch.float32
        assert predictions.labels.dtype == torch.int64
        assert not predictions.logits.requires_grad
        assert not predictions.logits.is_inference()

    def test_a_model_without_descriptions(self):
        assert predict(TinyModel(), batches_of(8)).zero_shot_logits is None

    def test_no_pictures(self, model: TinyModel):
        with pytest.raises(ValueError, match="no pictures"):
            predict(model, [])

    def test_a_diverged_model_is_an_error_not_a_metric(self, model: TinyModel):
        nn.init.constant_(model.head.bias, float("nan"))
        with pytest.raises(UserError, match="not finite"):
            predict(model, batches_of(8))


class TestPickExamples:
    @pytest.mark.parametrize(
        ("num_wrong", "num_right", "count", "expected_wrong"),
        [(20, 20, 12, 6), (2, 20, 12, 2), (20, 2, 12, 10), (3, 4, 12, 3), (0, 20, 5, 0), (20, 0, 5, 5), (9, 9, 7, 3)],
    )
    def test_half_wrong_half_right(self, num_wrong: int, num_right: int, count: int, expected_wrong: int):
        labels = torch.tensor([1] * num_wrong + [0] * num_right)
        predictions = Predictions(torch.tensor([[1.0, 0.0]]).expand(len(labels), 2), labels)
        chosen = pick_examples(predictions, count, seed=0)
        assert len(chosen) == len(chosen.unique()) == min(count, num_wrong + num_right)
        assert labels[chosen].tolist() == [1] * expected_wrong + [0] * (len(chosen) - expected_wrong)

    def test_seeded(self):
        predictions = random_predictions()
        picks = [pick_examples(predictions, 12, seed).tolist() for seed in (0, 0, 1)]
        assert picks[0] == picks[1] != picks[2]


class Sides(StubHead):
    """A picture's first two pixels of its first row are the logits of two classes."""

    def run(self, batch: Sequence[Tensor], **_: Any) -> ClassifierOutput:
        return answer(batch[0].flatten(1), batch[0][:, 0, 0, :2])


def test_accuracy_over_views_is_that_of_the_mean_probability() -> None:
    # Mirrored, the last two pixels, from the right. Probabilities of class 0, plain and mirrored, by the logit of it:
    rows = [
        [3.0, 0.0, 0.0, -1.0],  # 0.95, and 0.27: mean 0.61, class 0
        [1.0, 0.0, 0.0, -3.0],  # 0.73, and 0.05: mean 0.39, class 1
        [-1.0, 0.0, 0.0, 0.5],  # 0.27, and 0.62: mean 0.45, class 1
        [0.2, 0.0, 0.0, 0.1],  # 0.55, and 0.52: class 0
    ]
    images, labels = torch.tensor(rows).view(4, 1, 1, 4), torch.tensor([0, 1, 1, 1])
    for size in (4, 3):
        batches = list(zip(images.split(size), labels.split(size), strict=True))
        assert averaged_accuracy(Sides(), batches, "none") == pytest.approx(2 / 4)
        assert averaged_accuracy(Sides(), batches, "flip") == pytest.approx(3 / 4)
