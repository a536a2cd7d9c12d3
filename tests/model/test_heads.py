"""The classifier: no label reaches what predicts it, no picture sees its batch-mates, and it learns."""

from __future__ import annotations

import dataclasses
from math import log
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from tests.small import SMALL
from torch import Tensor

from diffmoe.model.heads import ImageClassifier
from diffmoe.model.outputs import TextFeatures

CLASSES, SENTENCES, B = 3, 2, 6
CONFIG = dataclasses.replace(SMALL, num_classes=CLASSES, max_text_len=5)
CLASS_TOKENS = torch.arange(1, 25).view(CLASSES, SENTENCES, 4)  # all sentences differ
CLASS_MASK = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 0]]]).expand(CLASSES, -1, -1)
LABELS = torch.arange(B) % CLASSES

Mode = Literal["image", "descriptions"]
MODES = pytest.mark.parametrize("mode", ["image", "descriptions"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def make(mode: Mode, tokens: Tensor | None = CLASS_TOKENS, **changes: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(
        dataclasses.replace(CONFIG, classify_with=mode, **changes), tokens, None if tokens is None else CLASS_MASK
    )


def pictures(count: int = B) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def run(model: ImageClassifier, labels: Tensor | None, classes: TextFeatures | None = None) -> dict[str, Any]:
    """The same random numbers at every call."""
    torch.manual_seed(7)
    with torch.no_grad():
        return model(pictures(), labels, classes)


# --- No label leaks ---


@MODES
@TRAINING
def test_no_label_reaches_the_logits(mode: Mode, training: bool) -> None:
    model = make(mode, dropout=0.3, router_noise=True).train(training)
    unlabelled = run(model, None)
    contrastive = set()
    for labels in (LABELS, LABELS.flip(0), torch.zeros_like(LABELS)):
        out = run(model, labels)
        for name in ("logits", "zero_shot_logits", "embedding"):
            assert torch.equal(out[name], unlabelled[name])
        contrastive.add(out["contrastive_loss"].item())
    assert len(contrastive) == 3  # the labels did arrive


@MODES
def test_no_gradient_of_the_logits_comes_from_the_label_losses(mode: Mode) -> None:
    def gradients(labels: Tensor | None) -> list[Tensor | None]:
        model = make(mode)
        torch.manual_seed(7)
        model(pictures(), labels)["logits"].square().sum().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(LABELS), gradients(None), strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


@TRAINING
def test_in_image_mode_no_description_reaches_the_logits(training: bool) -> None:
    model = make("image", dropout=0.3).train(training)
    changed = make("image", torch.where(torch.arange(CLASSES)[:, None, None] == 1, 29, CLASS_TOKENS), dropout=0.3)
    changed.train(training)
    out, out_changed = run(model, LABELS), run(changed, LABELS)
    assert torch.equal(out_changed["logits"], out["logits"])
    differs = (out_changed["zero_shot_logits"] != out["zero_shot_logits"]).any(0)
    assert differs.tolist() == [False, True, False]  # the description did change


def test_in_descriptions_mode_every_description_reaches_every_picture() -> None:
    # All classes' descriptions, not those of the true one: with the label of class 0 everywhere, the descriptions of
    # classes 1 and 2 still move the logits, of each picture.
    plain = run(make("descriptions").eval(), torch.zeros_like(LABELS))["logits"]
    for number in range(CLASSES):
        tokens = torch.where(torch.arange(CLASSES)[:, None, None] == number, 29, CLASS_TOKENS)
        changed = run(make("descriptions", tokens).eval(), torch.zeros_like(LABELS))["logits"]
        assert (changed != plain).any(-1).all()


# --- Evaluation ---


@MODES
def test_a_picture_alone_gets_the_logits_it_gets_in_a_batch(mode: Mode) -> None:
    model = make(mode).double().eval()
    images = pictures(64).double()
    together = model(images)
    for number in (0, 63):
        alone = model(images[number : number + 1])
        for name in ("logits", "zero_shot_logits"):
            torch.testing.assert_close(alone[name][0], together[name][number])


@MODES
def test_evaluation_is_deterministic(mode: Mode) -> None:
    model = make(mode, dropout=0.3, router_noise=True).eval()
    with torch.no_grad():
        first, second = model(pictures()), model(pictures())
    assert torch.equal(first["logits"], second["logits"])
    assert torch.equal(first["zero_shot_logits"], second["zero_shot_logits"])


@MODES
@TRAINING
def test_class_features_given_or_computed_are_the_same(mode: Mode, training: bool) -> None:
    model, other = make(mode).train(training), make(mode, CLASS_TOKENS.flip(0)).train(training)
    torch.manual_seed(7)
    with torch.no_grad():
        classes = other.class_features()
    given, computed = run(model, LABELS, classes), run(other, LABELS)
    for name in ("logits", "zero_shot_logits", "router_loss"):
        assert torch.equal(given[name], computed[name])
    assert not torch.equal(given["zero_shot_logits"], run(model, LABELS)["zero_shot_logits"])


def test_a_class_is_the_mean_of_its_sentences_in_evaluation_and_one_of_them_in_training() -> None:
    model = make("image")
    by_class = model.backbone.encode_text(CLASS_TOKENS.flatten(0, 1), CLASS_MASK.flatten(0, 1)).unflatten(
        0, (CLASSES, SENTENCES)
    )
    evaluated = model.eval().class_features()
    assert evaluated is not None
    torch.testing.assert_close(evaluated.embedding, F.normalize(by_class.mean(1), dim=-1))

    model.train()
    drawn: set[tuple[int, ...]] = set()
    for _ in range(20):
        classes = model.class_features()
        assert classes is not None
        distance = (classes.embedding[:, None] - by_class).norm(dim=-1)
        assert (distance.min(1).values < 1e-5).all()
        drawn.add(tuple(distance.argmin(1).tolist()))
    assert len(drawn) > SENTENCES  # not the same sentence number for all classes


def test_zero_shot_logits_are_scaled_cosines() -> None:
    model = make("image").eval()
    classes = model.class_features()
    assert classes is not None
    cosine = F.cosine_similarity(model.backbone.encode_image(pictures())[:, None], classes.embedding[None], dim=-1)
    torch.testing.assert_close(model(pictures())["zero_shot_logits"], cosine / 0.07)  # the initial temperature


# --- Learning ---


@MODES
def test_a_tiny_batch_overfits(mode: Mode) -> None:
    model = make(mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    history = []
    for _ in range(60):
        loss = F.cross_entropy(model(pictures(), LABELS)["logits"], LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] == pytest.approx(log(CLASSES), abs=0.3)  # undecided
    assert history[-1] < 0.02


def test_the_contrastive_loss_alone_teaches_zero_shot() -> None:
    # The floor: a picture finds its class for sure, 0; a class is torn between its two pictures, log 2; half of each.
    model = make("image")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    for _ in range(100):
        loss = model(pictures(), LABELS)["contrastive_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert log(2) / 2 < run(model, LABELS)["contrastive_loss"].item() < log(2) / 2 + 0.1
    assert torch.equal(run(model.eval(), None)["zero_shot_logits"].argmax(-1), LABELS)


# --- Mistakes ---


def test_descriptions_mode_needs_descriptions() -> None:
    with pytest.raises(ValueError, match="class_tokens"):
        make("descriptions", None)


def test_descriptions_of_another_number_of_classes_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 classes for num_classes 3"):
        ImageClassifier(CONFIG, CLASS_TOKENS[:2])


def test_without_descriptions_there_is_no_zero_shot_and_no_text_loss() -> None:
    out = run(make("image", None), LABELS)
    assert "zero_shot_logits" not in out
    assert out["contrastive_loss"] == 0
    assert out["cross_modal_loss"] == 0


def test_the_loss_of_a_mixed_picture_is_that_of_both_labels_by_their_shares() -> None:
    model = make("image", tokens=None)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels, others = torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0])
    share = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
    # Label smoothing 0.2 over 4 classes: 0.85 on the label, 0.05 on each of the rest.
    target = torch.full((3, 4), 0.05, dtype=torch.float64)
    for row, (label, other, part) in enumerate(zip(labels, others, share, strict=True)):
        target[row, label] += 0.8 * part
        target[row, other] += 0.8 * (1 - part)
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    output: Any = SimpleNamespace(logits=logits)
    found = model.score((torch.zeros(3, 1), labels, others, share), output, label_smoothing=0.2)
    torch.testing.assert_close(found.loss, expected)
    assert found.accuracy == (logits.argmax(-1) == labels).float().mean()
    assert found.num_targets == 3


@pytest.mark.parametrize("mixed", [False, True])
def test_a_picture_counts_as_much_as_its_class(mixed: bool) -> None:
    model = make("image", tokens=None)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels, others = torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0])
    share = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
    weights = torch.tensor([2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    batch = (torch.zeros(3, 1), labels, *((others, share) if mixed else ()))
    output: Any = SimpleNamespace(logits=logits)
    log_probs, own = logits.log_softmax(-1), share if mixed else torch.ones(3).double()
    expected = torch.tensor(0.0, dtype=torch.float64)
    for row, (label, other, part) in enumerate(zip(labels, others, own, strict=True)):
        expected -= part * weights[label] * log_probs[row, label] / 3
        expected -= (1 - part) * weights[other] * log_probs[row, other] / 3
    torch.testing.assert_close(model.score(batch, output, class_weights=weights).loss, expected)
    alike = model.score(batch, output, 0.1, torch.ones(4).double())
    torch.testing.assert_close(alike.loss, model.score(batch, output, 0.1).loss)
