"""`profile`: what a model costs, of a model file or a fresh one, as tables, pictures, a trace and JSON."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from tqdm import tqdm

from diffmoe.checkpoint import Head, load_checkpoint
from diffmoe.commands import TASKS, captions, classification
from diffmoe.commands.preparation import check_fits, check_vocabulary, parameter_counts, pictures_folder
from diffmoe.config import EMBEDDED_DATASETS, HUB_DATASETS, UserError
from diffmoe.data import VOCAB_SIZE, check_dataset
from diffmoe.files import check_outside_data, check_writable, write_atomically
from diffmoe.hardware import keep_freed_memory, make_fabric, pick_device, use_fast_matmul
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.objectives import CaptionObjective, ClassificationObjective
from diffmoe.profiling.costs import flop_counter, grouped, measure
from diffmoe.profiling.throughput import Batch, Contender, race
from diffmoe.settings import Settings
from diffmoe.visualization.figures import save
from diffmoe.visualization.profile import costs_by_part, throughput

NOTES = (
    "FLOPs: by torch's counter, of products and convolutions; rows that only fill experts' products up run, and count",
    "times: means over the middle half of {steps} training steps; the learning rate is 0",
    "memory: by torch's profiler; peak over weights and optimizer state; held: what a part's forward leaves allocated",
    "throughput: medians of {steps} rounds; in inference class descriptions were read before, and captions are given",
)


def profile(settings: Settings, batch_sizes: Sequence[int], steps: int, trace: bool) -> dict[str, Any]:
    """Profile a model file or a fresh model, write pictures and trace; what `--json` prints. Raises `UserError`."""
    run, trained = settings.run, None
    if (device := pick_device(run.device).type) == "mps" or run.num_devices > 1:
        raise UserError(f"device is {device!r}, num_devices {run.num_devices}: profile takes one, cpu or cuda")
    if run.checkpoint is not None:
        loaded = load_checkpoint(run.checkpoint)
        trained = loaded.model
        check_fits(settings, trained.config, Path(run.checkpoint))
        dataset = settings.data.dataset if "dataset" in settings.given else loaded.data.dataset
        settings = replace(settings, data=replace(settings.data, dataset=dataset), model=trained.config)
    folder, train, show = pictures_folder(settings) / "profile", settings.training, settings.visualization
    check_writable(folder)
    check_outside_data(folder, settings.data, "output_dir", "visualizations")
    check_vocabulary(settings.model)
    fabric = make_fabric(run)
    use_fast_matmul()
    keep_freed_memory()
    torch.manual_seed(train.seed)
    model, draw, is_real, notes = _subject(settings, trained, fabric, {*batch_sizes, train.batch_size})
    models = {"dense": model} if model.config.dense else {"dense": twin(model), "moe": model}
    contenders = {n: Contender(m, objective(m, train.label_smoothing), infer, train, fabric) for n, m in models.items()}
    (*twins, one), size = contenders.values(), train.batch_size
    parts, peak, recorded = measure(one, lambda: draw(size), is_real, steps)
    groups = grouped(parts)
    speeds = [*tqdm(race(contenders, batch_sizes, draw, steps), "throughput", leave=False, disable=None)]
    pictures = {"costs": costs_by_part(groups), "throughput": throughput(speeds)}
    if trace:
        write_atomically(folder / "trace.json", lambda unfinished: recorded.export_chrome_trace(str(unfinished)))
    return {
        "dataset": settings.data.dataset,
        "checkpoint": run.checkpoint,
        "task": type(model).__name__,
        "model": asdict(model.config),
        "device": str(fabric.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": size,
        "steps": steps,
        **_totals(one, draw(size)),
        "dense": _totals(twins[0], draw(size)) if twins else None,
        "step_ms": sum(row["ms"] for row in parts),
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "optimizer_bytes": sum(v.nbytes for state in one.optimizer.state.values() for v in state.values()),
        "peak_bytes": peak,
        "parts": parts,
        "grouped": groups,
        "throughput": speeds,
        "notes": [*notes, *(note.format(steps=steps) for note in NOTES)],
        "pictures": [str(save(f, folder / f"{name}.{show.figure_format}", show.dpi)) for name, f in pictures.items()],
        "trace": str(folder / "trace.json") if trace else None,
    }


def _totals(contender: Contender, batch: Batch) -> dict[str, Any]:
    """Parameters, and FLOPs of each picture of a batch."""
    with flop_counter() as training:
        contender.train(batch)
    with contender.inference() as infer, flop_counter() as inference:
        infer(batch)
    counters = {"inference": inference, "training": training}
    flops = {f"{name}_flops_per_image": c.get_total_flops() / len(batch[0]) for name, c in counters.items()}
    return parameter_counts(contender.model) | flops


def _subject(settings: Settings, trained: Head | None, fabric: Fabric, sizes: set[int]) -> tuple[Head, Any, bool, list]:
    """The model, new batches of these sizes, if they are real, what to say; noise instead of an unasked download."""
    dataset, is_fresh = settings.data.dataset, trained is None
    notes = [] if settings.model.dense else [f"routing: {'a fresh' if is_fresh else 'the trained'} router"]
    named = dataset not in HUB_DATASETS if is_fresh else "dataset" in settings.given
    if not (named or settings.data.data_dir or dataset in EMBEDDED_DATASETS or Path(dataset).is_dir()):
        model = trained or fresh(settings)
        said = "pictures, labels, captions: noise, as no data was named (--data_dir takes a folder)"
        return model, lambda size: noise(model, size), False, [*notes, said]
    parts = TASKS[check_dataset(settings.data)].prepare(settings, fabric)
    model = trained or parts.model
    batches: Any = parts.batches
    if type(model) is not type(parts.model) or model.config.num_classes != parts.model.config.num_classes:
        raise UserError(f"{settings.run.checkpoint} was trained for another task or other classes than {dataset}'s")
    if max(sizes) > len(batches.split):
        raise UserError(f"a batch of {max(sizes)} is asked for: {dataset} has {len(batches.split)} training pictures")

    def stream(size: int) -> Iterator[Batch]:
        resized = copy.copy(batches)
        resized.batch_size = size
        return (batch for epoch in itertools.count() for batch in resized.epoch(epoch) if len(batch[0]) == size)

    streams = {size: stream(size) for size in sizes}
    said = f"pictures: the training split of {dataset}, loaded and augmented as in training"
    return model, lambda size: next(streams[size]), True, [*notes, said]


def fresh(settings: Settings) -> Head:
    """A model of the settings without its data: class descriptions from templates, all words to write."""
    if settings.data.dataset == "flickr8k":
        captions.check_fusion(settings.model)
        return Captioner(settings.model, torch.arange(VOCAB_SIZE))
    names = [f"class {number}" for number in range(settings.model.num_classes)]
    tokens = classification.class_tokens(settings.data.dataset, names, settings.model.max_text_len)
    return ImageClassifier(settings.model, *tokens)


def twin(model: Head) -> Head:
    """The same model with each pool replaced by one expert top_k times as wide, freshly made."""
    text = (model.output_tokens,) if isinstance(model, Captioner) else (model.class_tokens, model.class_mask)
    return type(model)(replace(model.config, dense=True), *text)


def objective(model: Head, label_smoothing: float) -> nn.Module:
    """What training minimises."""
    kind: Any = CaptionObjective if isinstance(model, Captioner) else ClassificationObjective
    return kind(model, label_smoothing)


def infer(model: Head, batch: Batch, classes: Any) -> None:
    """Pictures to classes; or pictures and their captions to logits."""
    model(*batch) if isinstance(model, Captioner) else model(batch[0], classes=classes)


def noise(model: Head, batch_size: int) -> Batch:
    """A batch of normal noise of the model's shape, with random labels or captions."""
    config, device = model.config, next(model.parameters()).device
    images = torch.randn(batch_size, config.in_channels, config.img_size, config.img_size, device=device)
    if not isinstance(model, Captioner):
        return images, torch.randint(config.num_classes, (batch_size,), device=device)
    words = torch.randint(len(model.output_tokens), (batch_size, config.max_text_len), device=device)
    return images, model.output_tokens[words], torch.ones_like(words)
