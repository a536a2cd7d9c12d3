"""A report, made: every section that the task has, as figures and as one page that holds them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from diffmoe.config import DataConfig, UserError, VisualizationConfig, dataset_name
from diffmoe.data.loading import load_dataset
from diffmoe.evaluation.embedding import sample
from diffmoe.files import check_outside_data, check_writable
from diffmoe.inference import Predictor
from diffmoe.model.parameters import parameter_counts
from diffmoe.report import sections
from diffmoe.report.page import Facts, Section, write_report
from diffmoe.report.subject import Subject
from diffmoe.storage.run_files import RunFiles
from diffmoe.tasks import task_of_data
from diffmoe.visualization import figures
from diffmoe.visualization.captions import caption_scores
from diffmoe.visualization.language import LANGUAGES, Language, say, speaking

SPLITS = ("train", "validation", "test")
MOST_PICTURES = 10_000
"""Of a larger split so many, drawn at random, are looked at."""

HEADLINE = ("bleu4", "cider", "i2t_r1", "t2i_r1")
"""Of a captioner's scores those that stand at the top."""
NEED_ROUTING = {
    *("utilization", "load_over_time", "routing_maps", "favourite_patches", "specialization", "coactivation"),
    *("router_confidence", "without_experts"),
}
"""Sections that are left out where the model is dense."""
NEED_TOWERS = {"attention_maps", "attention_rollout", "class_maps"}
"""Sections that are left out where the model is a baseline."""


def make_report(
    checkpoint: str,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    split: str = "test",
    lang: Language = "en",
    device: str = "auto",
    show: VisualizationConfig | None = None,
    command: str = "",
) -> dict[str, str | list[str]]:
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
    if split not in SPLITS:
        raise UserError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")
    if lang not in LANGUAGES:
        raise UserError(f"lang is {lang!r}: it must be one of {', '.join(LANGUAGES)}")
    used = Predictor(checkpoint, device)
    folder = Path(show.output_dir) / used.info.dataset
    check_writable(folder)
    name = dataset or used.info.dataset
    if dataset_name(name) != used.info.dataset:
        raise UserError(f"dataset is {name!r}: the model in {checkpoint} was trained on {used.info.dataset!r}")
    data = DataConfig(dataset=name, data_dir=data_dir)
    used.info.check_source(data, checkpoint)
    check_outside_data(folder, data, "output_dir", "visualizations")
    run = RunFiles.beside(checkpoint)
    subject, all_pictures = _open_subject(used, data, split, run, show)
    saved: list[Path] = []
    with speaking(lang):
        title = say("What the experts do: {dataset}", dataset=used.info.dataset)
        facts = _facts(subject, split, all_pictures, run, command)
        page = write_report(folder / "report.html", title, _sections(subject, folder, saved), lang, facts)
    return {"report": str(page), "figures": [str(path) for path in saved]}


def _open_subject(
    used: Predictor, data: DataConfig, split: str, run: RunFiles, show: VisualizationConfig
) -> tuple[Subject, int]:
    """The model with its pictures, and how many the split has. Raises `UserError` where they do not go together."""
    if task_of_data(data) is not used.task:
        raise UserError(
            f"dataset {data.dataset!r} is for {task_of_data(data).data_kind}: this model was trained for "
            f"{used.task.data_kind}"
        )
    # Split as for training, so that nothing looked at was trained on.
    loaded = load_dataset(used.info.split_as_trained(data), used.picture)
    used.task.check_data(used.info.class_names, loaded, used.checkpoint)
    of_split = getattr(loaded, split)
    shown = of_split.subset(sample(len(of_split), seed=0, most=MOST_PICTURES))
    return Subject(used, shown, run.read_history(), run.read_metrics(), show), len(of_split)


def _sections(subject: Subject, folder: Path, saved: list[Path]) -> Iterator[Section]:
    """Make the parts one by one, with a progress bar; save each one's figures, and note where in `saved`."""
    names = subject.predictor.task.sections
    if subject.predictor.model.config.architecture != "moe":
        names = tuple(name for name in names if name not in NEED_TOWERS)
    if subject.predictor.model.config.dense:
        names = tuple(name for name in names if name not in NEED_ROUTING)
    bar = tqdm(names, "report", unit=" parts", leave=False, disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        section: Section = getattr(sections, name)(subject)
        for number, draw in enumerate(section.drawings, 1):
            suffix = f"_{number}" if len(section.drawings) > 1 else ""
            path = folder / f"{name}{suffix}.{subject.show.figure_format}"
            saved.append(figures.save(draw(), path, dpi=subject.show.dpi))
        yield section


def _facts(subject: Subject, split: str, all_pictures: int, run: RunFiles, command: str) -> Facts:
    count, model = len(subject.images), subject.predictor.model
    parameters = parameter_counts(model)
    summary: list[tuple[str, object]] = [
        (say("Dataset"), subject.predictor.info.dataset),
        (say("Pictures"), say("{count:,} of {split}", count=count, split=split)),
    ]
    if subject.class_names:
        right = subject.predictions.predicted == subject.predictions.labels
        summary.append((say("Accuracy"), f"{right.double().mean():.2%}"))
    elif split == "test":  # what diffmoe test measured
        told = caption_scores(subject.metrics)
        summary += [told[key] for key in HEADLINE if key in told]
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
