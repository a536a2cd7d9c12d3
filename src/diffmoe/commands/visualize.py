"""`visualize`: all that can be seen of a trained model, as figures and as one page that holds them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffmoe.commands import sections
from diffmoe.commands.preparation import parameter_counts
from diffmoe.commands.subject import Captioned, Labelled, Subject
from diffmoe.commands.use import UsedModel, open_model
from diffmoe.config import DataConfig, UserError, VisualizationConfig, dataset_name
from diffmoe.data import CaptionSplit, Split, check_dataset, load_captions, load_dataset
from diffmoe.evaluation.embedding import sample
from diffmoe.files import check_outside_data, check_writable
from diffmoe.model.heads import ImageClassifier
from diffmoe.runs import RunFiles
from diffmoe.visualization import figures
from diffmoe.visualization.language import Language, say, speaking
from diffmoe.visualization.report import Facts, Section, write_report

MOST_PICTURES = 10_000
"""Of a larger split so many, drawn at random, are looked at."""

Part = Callable[[Any], Section]

ROUTING: tuple[Part, ...] = (
    sections.utilization,
    sections.load_over_time,
    sections.routing_maps,
    sections.favourite_patches,
)
CLASSIFIER: tuple[Part, ...] = (
    sections.scores,
    sections.training_curves,
    sections.predictions,
    sections.confusion_matrix,
    sections.calibration,
    sections.per_class,
    *ROUTING,
    sections.specialization,
    sections.coactivation,
    sections.router_confidence,
    sections.attention_maps,
    sections.attention_rollout,
    sections.class_maps,
    sections.embedding_space,
    sections.without_experts,
)
CAPTIONER: tuple[Part, ...] = (
    sections.caption_scores,
    sections.training_curves,
    sections.caption_sheet,
    sections.retrieval,
    *ROUTING,
    sections.coactivation,
    sections.router_confidence,
    sections.attention_maps,
    sections.attention_rollout,
    sections.word_maps,
    sections.without_experts,
)
NEED_ROUTING = {*ROUTING, sections.specialization, sections.coactivation, sections.router_confidence}
NEED_ROUTING |= {sections.without_experts}
"""Left out where the model is dense."""


def visualize(
    checkpoint: str,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    split: str = "test",
    lang: Language = "en",
    device: str = "auto",
    show: VisualizationConfig | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Look at a model: `{report, figures}`, the paths of the page and of its figures.

    Args:
        checkpoint: model file; what its training left is looked for beside it.
        dataset: the one that it was trained on; None: under the name that the model file has of it.
        data_dir: folder that holds the dataset.
        split: whose pictures are looked at: train, validation or test.
        lang: of the page and its figures.
        device: where to compute.
        show: where figures go, and how they are written.
        command: what was typed, for the page.
    """
    show = show or VisualizationConfig()
    if split not in ("train", "validation", "test"):
        raise UserError(f"split is {split!r}: it must be train, validation or test")
    used = open_model(checkpoint, device)
    folder = Path(show.output_dir) / used.info.dataset
    check_writable(folder)
    name = dataset or used.info.dataset
    if dataset_name(name) != used.info.dataset:
        raise UserError(f"dataset is {name!r}: the model in {checkpoint} was trained on {used.info.dataset!r}")
    check_outside_data(folder, DataConfig(dataset=name, data_dir=data_dir), "output_dir", "visualizations")
    run = RunFiles.beside(checkpoint)
    subject, all_pictures = _open_subject(used, DataConfig(dataset=name, data_dir=data_dir), split, run, show)
    saved: list[Path] = []
    with speaking(lang):
        title = say("What the experts do: {dataset}", dataset=used.info.dataset)
        facts = _facts(subject, split, all_pictures, run, command)
        page = write_report(folder / "report.html", title, _sections(subject, folder, saved), lang, facts)
    return {"report": str(page), "figures": [str(path) for path in saved]}


def _open_subject(
    used: UsedModel, data: DataConfig, split: str, run: RunFiles, show: VisualizationConfig
) -> tuple[Subject, int]:
    """The model with its pictures, and how many the split has. Raises `UserError` where they do not go together."""
    info, config, model = used.info, used.model.config, used.model
    wanted = "classification" if isinstance(model, ImageClassifier) else "captions"
    if (task := check_dataset(data)) != wanted:
        raise UserError(f"dataset {data.dataset!r} is for {task}: this model was trained for {wanted}")
    splits = ("val_fraction", "test_fraction", "split_seed")  # so that nothing looked at was trained on
    data = dataclasses.replace(data, **{name: getattr(info, name) for name in splits})
    size: dict[str, Any] = {"img_size": config.img_size, "in_channels": config.in_channels}
    beside: dict[str, Any] = {"history": run.read_history(), "metrics": run.read_metrics(), "show": show}
    if isinstance(model, ImageClassifier):
        loaded = load_dataset(data, **size)
        if loaded.class_names != info.class_names:
            raise UserError(f"dataset {data.dataset!r} has other classes than those that this model was trained on")
        of_split: Split = getattr(loaded, split)
        return Labelled(used, **beside, model=model, split=of_split.subset(_drawn(of_split))), len(of_split)
    captioned: CaptionSplit = getattr(load_captions(data, **size), split)
    return Captioned(used, **beside, model=model, split=captioned.subset(_drawn(captioned))), len(captioned)


def _drawn(split: Sized) -> Tensor:
    return sample(len(split), seed=0, most=MOST_PICTURES)


def _sections(subject: Subject, folder: Path, saved: list[Path]) -> Iterator[Section]:
    """Make the parts one by one, with a progress bar; save each one's figures, and note where in `saved`."""
    parts = CLASSIFIER if isinstance(subject, Labelled) else CAPTIONER
    if subject.used.model.config.dense:
        parts = tuple(part for part in parts if part not in NEED_ROUTING)
    bar = tqdm(parts, "report", unit=" parts", leave=False, disable=None)
    for part in bar:
        bar.set_postfix_str(part.__name__)
        section = part(subject)
        for number, figure in enumerate(section.figures, 1):
            suffix = f"_{number}" if len(section.figures) > 1 else ""
            path = folder / f"{part.__name__}{suffix}.{subject.show.figure_format}"
            saved.append(figures.save(figure, path, dpi=subject.show.dpi))
        yield section


def _facts(subject: Subject, split: str, all_pictures: int, run: RunFiles, command: str) -> Facts:
    count, model = len(subject.images), subject.used.model
    parameters = parameter_counts(model)
    summary: list[tuple[str, object]] = [
        (say("Dataset"), subject.used.info.dataset),
        (say("Pictures"), say("{count:,} of {split}", count=count, split=split)),
    ]
    if isinstance(subject, Labelled):
        right = subject.predictions.predicted == subject.predictions.labels
        summary.append((say("Accuracy"), f"{right.double().mean():.2%}"))
    summary += [
        (say("Parameters"), f"{parameters['parameters_total']:,}"),
        (say("Active for a token"), f"{parameters['parameters_active']:,}"),
        (say("Date"), time.strftime("%Y-%m-%d %H:%M")),
    ]
    notes = []
    if model.config.dense:
        notes.append(say("This model is dense: it has no routing, and the parts about experts are left out."))
    if not subject.history:
        notes.append(say("Nothing of its training was found: there is no {path}.", path=run.history))
    if count < all_pictures:
        notes.append(
            say("Shown are {count:,} of the split's {all:,} pictures, at random.", count=count, all=all_pictures)
        )
    return Facts(summary, notes, list(dataclasses.asdict(model.config).items()), command)
