"""The parts of the report, one function for each: what it is of, its figures, how to read them.

Which of them a report has, and in which order, the task says by their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from diffmoe.data.text import detokenize
from diffmoe.evaluation import embedding as embeddings
from diffmoe.evaluation.ablation import ablation
from diffmoe.evaluation.attention import description_attention, patch_similarity, rollout, word_attention
from diffmoe.evaluation.classification import pick_examples
from diffmoe.evaluation.experts import BlockRouting, class_expert_counts
from diffmoe.evaluation.history import load_history
from diffmoe.report.page import Drawing, Section, how_to_read
from diffmoe.report.subject import Subject
from diffmoe.tasks.captioning import SHEET, embed, sheet, write_captions
from diffmoe.visualization import attention, captions, experts, figures
from diffmoe.visualization.embedding import embedding_map
from diffmoe.visualization.language import say

ABLATION_PASSES = 20_000
"""Pictures of all passes of the ablation together: it has one for each expert of each block."""
MOST_FAVOURITES = 3
"""Blocks of the image tower whose experts' favourite patches are shown."""


def scores(subject: Subject) -> Section:
    """The figures of the whole split."""
    metrics = subject.scores
    table = [(say("score"), say("value")), (say("accuracy"), _percent(metrics["accuracy"]))]
    if len(subject.class_names) > 5:  # else it is always 100%
        table.append((say("top-5 accuracy"), _percent(metrics["top5_accuracy"])))
    if "zero_shot_accuracy" in metrics:
        table.append((say("zero-shot accuracy, by class descriptions"), _percent(metrics["zero_shot_accuracy"])))
    averaged = subject.metrics.get("test_accuracy_tta")
    if isinstance(averaged, float):  # whatever split is shown: what diffmoe test --tta wrote beside the model file
        table.append((say("accuracy on the test split, mean over views (test --tta)"), _percent(averaged)))
    table.append((say("expected calibration error"), _percent(metrics["ece"])))
    table.append((say("cross-entropy, nats"), f"{metrics['nll']:.4f}"))
    return Section(say("Scores"), (), "", table=table)


def caption_scores(subject: Subject) -> Section:
    """What `diffmoe test` measured."""
    found = captions.caption_scores(subject.metrics)
    if not found:
        return _left_out(say("Scores"), say("diffmoe test has written none beside the model file."))
    table = [(say("score"), say("value")), *found.values()]
    return Section(say("Scores"), (), "", say("As diffmoe test wrote them beside the model file."), table)


def training_curves(subject: Subject) -> Section:
    """Loss by part, accuracy, learning rate."""
    title = say("Training")
    if not subject.history:
        return _left_out(title, say("there is no history.csv of its training beside the model file."))
    draw = partial(figures.training_curves, subject.history, subject.predictor.task.curve)
    return Section(title, [draw], how_to_read(figures.training_curves))


def predictions(subject: Subject) -> Section:
    """Right and wrong ones, with probabilities."""
    found = subject.predictions
    shown = pick_examples(found, subject.show.examples, seed=0)
    draw = partial(
        figures.prediction_grid,
        *(subject.images[shown], found.labels[shown], found.probabilities[shown], subject.class_names),
    )
    wrong = int((found.predicted != found.labels).sum())
    note = say("{wrong:,} of {count:,} pictures are classified wrong.", wrong=wrong, count=len(found.labels))
    return Section(say("Predictions, right and wrong"), [draw], how_to_read(figures.prediction_grid), note)


def confusion_matrix(subject: Subject) -> Section:
    """Which class is taken for which."""
    draw = partial(figures.confusion_matrix, subject.scores["confusion_matrix"], subject.class_names)
    return Section(say("Confusion matrix"), [draw], how_to_read(figures.confusion_matrix))


def calibration(subject: Subject) -> Section:
    """Whether the model is as right as it is sure."""
    note = say("Confidence and accuracy differ by {error:.1%} on average.", error=subject.scores["ece"])
    draw = partial(figures.reliability_diagram, subject.predictions)
    return Section(say("Calibration"), [draw], how_to_read(figures.reliability_diagram), note)


def per_class(subject: Subject) -> Section:
    """Precision and recall."""
    metrics, most = subject.scores, subject.show.weakest_classes
    draw = partial(figures.per_class, metrics["precision"], metrics["recall"], subject.class_names, most)
    return Section(say("Class by class"), [draw], how_to_read(figures.per_class))


def caption_sheet(subject: Subject) -> Section:
    """What the model writes beside a reference."""
    used, rows = subject.predictor, subject.predictor.task.examples(subject.split, SHEET)
    written = write_captions(subject.captioner, subject.images[rows], used.picture, subject.generation, seed=0)
    draw = partial(sheet, subject.split, rows, written)
    held_out = subject.split.held_out
    is_any_new = held_out is not None and bool(held_out[rows].any())
    note = say("A new pair of colour and kind is in no training picture.") if is_any_new else ""
    return Section(say("Captions"), [draw], how_to_read(captions.caption_sheet), note)


def retrieval(subject: Subject) -> Section:
    """The pictures that a caption finds."""
    images, texts, _ = embed(subject.captioner, subject.split, subject.predictor.picture, subject.runtime)
    best = (images @ texts[0]).topk(min(8, len(images)))
    query = subject.split.captions[0][0]
    draw = partial(captions.retrieval_grid, query, subject.images[best.indices], best.values, best.indices == 0)
    note = say("Of {count:,} pictures, the most similar.", count=len(images))
    return Section(say("Retrieval by a caption"), [draw], how_to_read(captions.retrieval_grid), note)


def utilization(subject: Subject) -> Section:
    """The load of every block, and how uneven it is."""
    note = say(
        "CV: standard deviation over mean of the load, 0 when even. Max/mean: what the slowest device waits for. "
        "Dead: experts without a token. Entropy: of the load over its maximum, 1 when even."
    )
    draw = partial(experts.utilization, subject.blocks)
    return Section(say("Expert utilisation"), [draw], how_to_read(experts.utilization), note)


def load_over_time(subject: Subject) -> Section:
    """The load of each epoch of the training."""
    title = say("Load over training time")
    if not load_history(subject.history):
        return _left_out(title, say("the history of the training has no expert load, or is not there."))
    return Section(title, [partial(experts.load_over_time, subject.history)], how_to_read(experts.load_over_time))


def routing_maps(subject: Subject) -> Section:
    """Which expert takes which patch."""
    drawn = [
        partial(experts.routing_map, subject.images[row], [block[row : row + 1] for block in subject.image_blocks])
        for row in subject.examples.tolist()
    ]
    return Section(say("Which expert takes which patch"), drawn, how_to_read(experts.routing_map))


def favourite_patches(subject: Subject) -> Section:
    """The patches that each expert likes most."""
    size = subject.predictor.model.config.patch_size
    blocks = _some(subject.image_blocks, MOST_FAVOURITES)
    drawn = [partial(experts.favourite_patches, subject.images, block, size) for block in blocks]
    return Section(say("The patches that each expert likes most"), drawn, how_to_read(experts.favourite_patches))


def specialization(subject: Subject) -> Section:
    """What an expert tells of the class."""
    labels, names = subject.predictions.labels, subject.class_names
    counts = torch.stack([class_expert_counts(block, labels, len(names)) for block in subject.image_blocks])
    drawn = [partial(experts.specialization, counts, names)]
    sets = [name.partition(": ")[0] for name in names]
    if set(subject.predictor.info.dataset.split("+")) == set(sets):  # several sets, named before their classes
        of_set = [torch.tensor([found == name for found in sets]) for name in dict.fromkeys(sets)]
        by_set = torch.stack([counts[:, rows].sum(1) for rows in of_set], 1)
        drawn.append(partial(experts.specialization, by_set, tuple(dict.fromkeys(sets))))
    return Section(say("Experts and classes"), drawn, how_to_read(experts.specialization))


def coactivation(subject: Subject) -> Section:
    """Which experts work together."""
    title = say("Experts that work together")
    if subject.predictor.model.config.top_k == 1:
        return _left_out(title, say("every token is sent to one expert only."))
    return Section(title, [partial(experts.coactivation_map, subject.blocks)], how_to_read(experts.coactivation_map))


def router_confidence(subject: Subject) -> Section:
    """How sure the routers are."""
    draw = partial(experts.router_confidence, subject.blocks)
    return Section(say("Router confidence and entropy"), [draw], how_to_read(experts.router_confidence))


def attention_maps(subject: Subject) -> Section:
    """Where the image tower looks: on average, and from the patch in the middle."""
    drawn: list[Drawing] = []
    for number, row in enumerate(subject.examples[:2].tolist()):
        maps = subject.attention_of(number)
        side = round(maps[0].weights.shape[-1] ** 0.5)
        middle = side // 2 * side + side // 2
        drawn += [partial(attention.attention_maps, subject.images[row], maps, patch) for patch in (None, middle)]
    note = say("Of two pictures: first the mean over all patches, then what the framed patch looks at.")
    return Section(say("Attention"), drawn, how_to_read(attention.attention_maps), note)


def attention_rollout(subject: Subject) -> Section:
    """How much of each patch is in the picture's embedding."""
    drawn = [
        partial(attention.attention_rollout, subject.images[row], rollout(subject.attention_of(number))[0].mean(0))
        for number, row in enumerate(subject.examples.tolist())
    ]
    note = say("Attention multiplied through all blocks, half of it passing by each (Abnar and Zuidema 2020).")
    return Section(say("Attention rollout"), drawn, how_to_read(attention.attention_rollout), note)


def class_maps(subject: Subject) -> Section:
    """Pictures read with the descriptions of the classes."""
    title = say("Pictures and class descriptions")
    rows, used = subject.examples, subject.predictor
    if used.classes is None:
        return _left_out(title, say("this model was trained without class descriptions."))
    pictures = used.prepare(subject.images[rows])
    similarity = patch_similarity(used.model, pictures, used.classes).cpu()
    limits = (float(similarity.min()), float(similarity.max()))
    drawn = [
        partial(attention.class_maps, subject.images[row], subject.class_names, similarity[number], limits=limits)
        for number, row in enumerate(rows.tolist())
    ]
    if subject.classifier.reads_descriptions:
        shares = description_attention(subject.attention).cpu()
        drawn += [
            partial(attention.class_maps, subject.images[row], subject.class_names, shares[number], "attention")
            for number, row in enumerate(rows.tolist())
        ]
    return Section(title, drawn, how_to_read(attention.class_maps))


def word_maps(subject: Subject) -> Section:
    """Where the model looks as it writes each word."""
    found = word_attention(subject.attention, subject.written)
    drawn = [
        partial(attention.word_maps, subject.images[row], words, weights.cpu())
        for row, (words, weights) in zip(subject.examples.tolist(), found, strict=True)
        if words
    ]
    title = say("Pictures and words")
    if not drawn:
        return _left_out(title, say("the model writes nothing for these pictures."))
    note = say("Captions: {captions}.", captions=" · ".join(detokenize(subject.written.cpu())))
    return Section(title, drawn, how_to_read(attention.word_maps), note)


def embedding_space(subject: Subject) -> Section:
    """The pictures in a plane."""
    rows, used = embeddings.sample(len(subject.split), seed=0), subject.predictor
    points, labels = embeddings.embed(used.model, subject.batches(rows).epoch(), classes=used.classes)
    draw = partial(embedding_map, embeddings.project(points, seed=0), labels, subject.class_names)
    return Section(say("Embedding space"), [draw], how_to_read(embedding_map))


def without_experts(subject: Subject) -> Section:
    """What accuracy loses with each expert."""
    title = say("Without each expert")
    config = subject.predictor.model.config
    if config.top_k >= config.num_general_experts:
        return _left_out(title, say("every token is sent to all experts: there is none to spare."))
    passes = 1 + len(subject.blocks) * config.num_general_experts
    rows = embeddings.sample(len(subject.images), seed=0, most=max(200, min(2000, ABLATION_PASSES // passes)))
    batches = subject.batches(rows)
    found = ablation(subject.predictor.model, batches.epoch, classes=subject.predictor.classes)
    return Section(title, [partial(experts.ablation_map, found)], how_to_read(experts.ablation_map))


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _some(blocks: Sequence[BlockRouting], most: int) -> list[BlockRouting]:
    """At most so many, from the first to the last."""
    if len(blocks) <= most:
        return list(blocks)
    return [blocks[round(step * (len(blocks) - 1) / (most - 1))] for step in range(most)]


def _left_out(title: str, reason: str) -> Section:
    return Section(title, (), "", say("Left out: {reason}", reason=reason))
