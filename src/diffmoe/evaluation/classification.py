"""Predictions as tensors, then metrics from them.

Shapes: N pictures, B pictures of one batch, C classes, S bins of confidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.evaluation.passes import Autocast, Kept, finite_or_told, run_over
from diffmoe.evaluation.views import views
from diffmoe.model.heads import Head
from diffmoe.model.outputs import ClassifierOutput

CALIBRATION_BINS = 15
"""Equal bins of confidence, as in Guo et al. 2017."""

FEWEST_TO_CALIBRATE = 50
"""Pictures by fewer of which no temperature is told from chance."""
TEMPERATURES = (0.25, 16.0)
"""The least and the largest."""

_BELOW_ONE = 1 - 2**-24
"""The largest float32 under 1."""


@dataclass(frozen=True)
class Predictions:
    """What a model said of N pictures, on the CPU, beside what is true."""

    logits: Tensor
    """(N, C) float32."""
    labels: Tensor
    """(N,) int64, the true classes."""
    zero_shot_logits: Tensor | None = None
    """(N, C) float32, cosine of each picture's embedding with each class description's, times the temperature; None
    where the model has no descriptions."""

    @property
    def probabilities(self) -> Tensor:
        """(N, C) float32, softmax of the logits."""
        return self.logits.softmax(dim=1)

    @property
    def predicted(self) -> Tensor:
        """(N,) int64, the class with the largest logit; the first of equals."""
        return self.logits.argmax(dim=1)


def take_predictions(batch: Sequence[Tensor], output: ClassifierOutput) -> tuple[Tensor, ...]:
    """For `Kept`: what `as_predictions` wants of a batch."""
    logits = (output.logits, output.zero_shot_logits)
    return (batch[1], *(tensor.float() for tensor in logits if tensor is not None))


def as_predictions(kept: Kept) -> Predictions:
    """Of all batches so far. Raises `UserError` where a logit is not finite."""
    labels, *logits = kept.tensors()
    predictions = Predictions(logits[0], labels, *logits[1:])
    with finite_or_told():
        if not predictions.logits.isfinite().all():
            raise FloatingPointError
    return predictions


def predict(model: Head, batches: Iterable[Sequence[Tensor]], autocast: Autocast = nullcontext) -> Predictions:
    """Run a classifier once over `batches`: pictures (B, ch, H, W), normalised and on its device, labels (B,) int64.

    Raises `ValueError` where there are no batches, `UserError` where a logit is not finite: the model diverged, and a
    metric of such logits would look like one.
    """
    kept = Kept(take_predictions)
    run_over(model, batches, kept.add, autocast=autocast)
    return as_predictions(kept)


def averaged_accuracy(
    model: Head, batches: Iterable[Sequence[Tensor]], tta: str, autocast: Autocast = nullcontext
) -> float:
    """Accuracy of the mean of the probabilities over all `views` of each picture, 0 to 1; batches as in `predict`."""
    kept = Kept(lambda batch, output: (output.logits.float().softmax(-1),))
    labels: list[Tensor] = []
    counts: list[int] = []

    def viewed() -> Iterator[tuple[Tensor, Tensor]]:
        for images, of_images in batches:
            of_batch = list(views(images, tta))
            labels.append(of_images.cpu())
            counts.append(len(of_batch))
            yield from ((view, of_images) for view in of_batch)

    run_over(model, viewed(), kept.add, autocast=autocast)
    taken = iter(kept.taken)
    predicted = [torch.stack([next(taken)[0] for _ in range(count)]).sum(0).argmax(-1) for count in counts]
    return (torch.cat(predicted) == torch.cat(labels)).float().mean().item()


def classification_metrics(
    predictions: Predictions, num_classes: int
) -> dict[str, float | list[float] | list[list[int]]]:
    """Metrics over all N predictions, as plain Python that JSON can hold.

    - `accuracy`, and `top5_accuracy` (top C where there are fewer than 5 classes), from 0 to 1;
    - `precision`, `recall`: C values from 0 to 1; 0 for a class that was never predicted, or that has no picture;
    - `confusion_matrix`: C x C counts, a row for each true class and a column for each predicted one;
    - `ece`: expected calibration error, see `calibration_error`;
    - `nll`: mean cross-entropy, in nats;
    - `zero_shot_accuracy`: only where there are zero-shot logits.

    Raises `ValueError` where `num_classes` is under 2 or is not C.
    """
    # Imported here because it takes seconds, which those who only predict need not pay.
    from torchmetrics.functional import classification as metrics

    logits, labels = predictions.logits, predictions.labels
    results: dict[str, float | list[float] | list[list[int]]] = {
        "accuracy": metrics.multiclass_accuracy(logits, labels, num_classes, average="micro").item(),
        "top5_accuracy": metrics.multiclass_accuracy(
            logits, labels, num_classes, average="micro", top_k=min(5, num_classes)
        ).item(),
        "precision": metrics.multiclass_precision(logits, labels, num_classes, average="none").tolist(),
        "recall": metrics.multiclass_recall(logits, labels, num_classes, average="none").tolist(),
        "confusion_matrix": metrics.multiclass_confusion_matrix(logits, labels, num_classes).tolist(),
        "ece": calibration_error(predictions),
        "nll": F.cross_entropy(logits, labels).item(),
    }
    if predictions.zero_shot_logits is not None:
        results["zero_shot_accuracy"] = metrics.multiclass_accuracy(
            predictions.zero_shot_logits, labels, num_classes, average="micro"
        ).item()
    return results


def calibration_error(predictions: Predictions, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error, 0 to 1: `sum_s n_s / N · |accuracy_s - confidence_s|` (Guo et al. 2017, eq. 3)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    # torchmetrics gives a confidence of exactly 1 a bin of its own after the last; the definition has no such bin.
    probabilities = predictions.probabilities.clamp(max=_BELOW_ONE)
    return multiclass_calibration_error(probabilities, predictions.labels, probabilities.shape[1], bins).item()


def fit_temperature(predictions: Predictions) -> float:
    """The T with which softmax(logits / T) says best how often it is right: that of the least mean cross-entropy (Guo
    et al. 2017, section 4.2). Over 1 where the model is too sure of itself. No answer changes, only how sure it is.

    From `TEMPERATURES`; 1 of too few predictions, and where a logit is not finite.
    """
    from scipy.optimize import minimize_scalar

    if len(predictions.labels) < FEWEST_TO_CALIBRATE or not predictions.logits.isfinite().all():
        return 1.0
    logits = predictions.logits.double()

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), predictions.labels).item()

    low, high = map(math.log, TEMPERATURES)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)


@dataclass(frozen=True)
class CalibrationBins:
    """Predictions by their confidence, the probability of the predicted class, in S equal bins from 0 to 1."""

    accuracy: Tensor
    """(S,) float32, share of right predictions; nan in an empty bin."""
    confidence: Tensor
    """(S,) float32, mean confidence; nan in an empty bin."""
    count: Tensor
    """(S,) int64."""


def calibration_bins(predictions: Predictions, bins: int = CALIBRATION_BINS) -> CalibrationBins:
    """What `calibration_error` sums over: bin s holds the confidences from s/S up to, but not including, (s+1)/S."""
    confidence, predicted = predictions.probabilities.clamp(max=_BELOW_ONE).max(dim=1)
    right = (predicted == predictions.labels).float()
    which_bin = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1), right=True) - 1
    count = which_bin.bincount(minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return (which_bin.bincount(values, minlength=bins) / count).float()

    return CalibrationBins(mean(right), mean(confidence), count)


def pick_examples(predictions: Predictions, count: int, seed: int) -> Tensor:
    """Indices of `count` pictures to show, (min(count, N),) int64: half wrong, then half right, each in random order.

    Where one half has too few, the other fills up. The same `seed` picks the same pictures.
    """
    order = torch.randperm(len(predictions.labels), generator=torch.Generator().manual_seed(seed))
    is_wrong = (predictions.predicted != predictions.labels)[order]
    wrong, right = order[is_wrong], order[~is_wrong]
    num_wrong = min(len(wrong), max(count // 2, count - len(right)))
    return torch.cat([wrong[:num_wrong], right[: count - num_wrong]])
