"""`profile`: what a model costs, of a model file or a fresh one, as tables, pictures, a trace and JSON."""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.commands.parsing import bare_parser, show
from diffmoe.config import EMBEDDED_DATASETS, HUB_DATASETS, UserError
from diffmoe.config.settings import Settings, parse_settings

if TYPE_CHECKING:
    import torch

    from diffmoe.model.heads import Head
    from diffmoe.profiling.throughput import Batch, Contender

NOTES = (
    "FLOPs: by torch's counter, of products and convolutions; rows that only fill experts' products up run, and count",
    "times: means over the middle half of {steps} training steps; the learning rate is 0",
    "memory: by torch's profiler; peak over weights and optimizer state; held: what a part's forward leaves allocated",
    "throughput: medians of {steps} rounds; in inference class descriptions were read before, and captions are given",
)


def main(argv: Sequence[str]) -> int:
    """Profile a model."""
    parser = bare_parser("profile", "What a model costs, by part: a trained one, or a fresh one of any settings.")
    parser.epilog = (
        "Also the flags of `diffmoe train`: --checkpoint, --dataset, --data_dir, --preset, --batch_size (of the step "
        "that is taken apart), --seed, --device, --output_dir, and every field of the model."
    )
    parser.add_argument(
        "--batch_sizes", nargs="+", type=int, default=[1, 8, 64, 256], metavar="N", help="of the throughput's curve"
    )
    parser.add_argument("--steps", type=int, default=10, help="measured steps and rounds; medians count (default: 10)")
    parser.add_argument(
        "--trace", action=argparse.BooleanOptionalAction, default=True, help="write a trace that Perfetto opens"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args, rest = parser.parse_known_args(argv)
    if min(args.batch_sizes) < 1:
        raise UserError(f"batch_sizes are {' '.join(map(str, args.batch_sizes))}: each must be at least 1")
    if args.steps < 1:
        raise UserError(f"steps is {args.steps}: it must be at least 1")
    from diffmoe.commands.profile_tables import print_profile

    settings = parse_settings(rest, prog="diffmoe profile", mode="profile")
    return show(profile(settings, sorted(set(args.batch_sizes)), args.steps, args.trace), args.json, print_profile)


def profile(settings: Settings, batch_sizes: Sequence[int], steps: int, trace: bool) -> dict[str, Any]:
    """Profile a model file or a fresh model, write pictures and trace; what `--json` prints. Raises `UserError`."""
    import torch

    from diffmoe.files import check_outside_data, check_writable
    from diffmoe.hardware import pick_device, tuned
    from diffmoe.runs import check_fits, pictures_folder
    from diffmoe.storage.model_files import load_model_file

    run, trained = settings.run, None
    if (device := pick_device(run.device).type) == "mps" or run.num_devices > 1:
        raise UserError(f"device is {device!r}, num_devices {run.num_devices}: profile takes one, cpu or cuda")
    if run.checkpoint is not None:
        loaded = load_model_file(run.checkpoint)
        trained = loaded.model
        check_fits(settings, trained.config, Path(run.checkpoint))
        dataset = settings.data.dataset if "dataset" in settings.given else loaded.data.dataset
        settings = replace(settings, data=replace(settings.data, dataset=dataset), model=trained.config)
    folder = pictures_folder(settings) / "profile"
    check_writable(folder)
    check_outside_data(folder, settings.data, "output_dir", "visualizations")
    with torch.random.fork_rng(), tuned():
        return _profile(settings, trained, batch_sizes, steps, folder, trace)


def _profile(
    settings: Settings, trained: Head | None, batch_sizes: Sequence[int], steps: int, folder: Path, trace: bool
) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    from diffmoe.files import write_atomically
    from diffmoe.profiling.costs import grouped, measure
    from diffmoe.profiling.throughput import Contender, race
    from diffmoe.training.parallel import make_fabric
    from diffmoe.visualization.figures import save
    from diffmoe.visualization.profile import costs_by_part, throughput

    run, train, show = settings.run, settings.training, settings.visualization
    fabric = make_fabric(run)
    torch.manual_seed(train.seed)
    model, draw, is_real, notes = _subject(settings, trained, fabric.device, {*batch_sizes, train.batch_size})
    models = {"dense": model.like(replace(model.config, dense=True)), "moe": model}
    models = {"dense": model} if model.config.dense else models
    contenders = {name: Contender(fabric, each, train) for name, each in models.items()}
    (*twins, one), size = contenders.values(), train.batch_size
    parts, peak, recorded = measure(one, lambda: draw(size), is_real, steps)
    groups = grouped(parts)
    speeds = [*tqdm(race(contenders, batch_sizes, draw, steps), "throughput", leave=False, disable=None)]
    drawn = {"costs": costs_by_part(groups), "throughput": throughput(speeds)}
    if trace:
        write_atomically(folder / "trace.json", lambda unfinished: recorded.export_chrome_trace(str(unfinished)))
    return {
        **_setting(settings, one, steps),
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
        "pictures": [str(save(f, folder / f"{name}.{show.figure_format}", show.dpi)) for name, f in drawn.items()],
        "trace": str(folder / "trace.json") if trace else None,
    }


def _setting(settings: Settings, contender: Contender, steps: int) -> dict[str, object]:
    """What is profiled, and where."""
    import torch

    return {
        "dataset": settings.data.dataset,
        "checkpoint": settings.run.checkpoint,
        "task": type(contender.model).__name__,
        "model": asdict(contender.model.config),
        "device": str(contender.fabric.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": contender.config.batch_size,
        "steps": steps,
    }


def _totals(contender: Contender, batch: Batch) -> dict[str, float]:
    """Parameters, and FLOPs of each picture of a batch."""
    from diffmoe.model.parameters import parameter_counts
    from diffmoe.profiling.costs import flop_counter

    with flop_counter() as training:
        contender.train(batch)
    with contender.inference() as infer, flop_counter() as inference:
        infer(batch)
    counters = {"inference": inference, "training": training}
    flops = {f"{name}_flops_per_image": c.get_total_flops() / len(batch[0]) for name, c in counters.items()}
    return parameter_counts(contender.model) | flops


def _subject(
    settings: Settings, trained: Head | None, device: torch.device, sizes: set[int]
) -> tuple[Head, Callable[[int], Batch], bool, list[str]]:
    """The model, new batches of these sizes, if they are real, what to say; noise instead of an unasked download."""
    from diffmoe.data.loading import load_dataset
    from diffmoe.data.pictures import PictureSpec
    from diffmoe.tasks import TASKS, task_of_data, task_of_model

    dataset, is_fresh, config = settings.data.dataset, trained is None, settings.model
    notes = [] if config.dense else [f"routing: {'a fresh' if is_fresh else 'the trained'} router"]
    named = dataset not in HUB_DATASETS if is_fresh else "dataset" in settings.given
    if not (named or settings.data.data_dir or dataset in EMBEDDED_DATASETS or Path(dataset).is_dir()):
        kind = "captions" if dataset == "flickr8k" else "classification"  # of the sets of the hub that have a name
        task = task_of_model(trained) if trained else next(task for task in TASKS if task.data_kind == kind)
        task.check(settings)
        model = (trained or task.made_up(settings)).to(device)
        said = "pictures, labels, captions: noise, as no data was named (--data_dir takes a folder)"
        return model, lambda size: [part.to(device) for part in task.noise(model, size)], False, [*notes, said]
    task = task_of_data(settings.data)
    task.check(settings)
    data = load_dataset(settings.data, PictureSpec(config.img_size, config.in_channels))
    model = trained or task.build(settings, data)
    if task_of_model(model) is not task or (data.class_names and model.config.num_classes != len(data.class_names)):
        raise UserError(f"{settings.run.checkpoint} was trained for another task or other classes than {dataset}'s")
    if max(sizes) > len(data.train):
        raise UserError(f"a batch of {max(sizes)} is asked for: {dataset} has {len(data.train)} training pictures")
    batches = task.training_batches(settings, data, device)

    def stream(size: int) -> Iterator[Batch]:
        resized = copy.copy(batches)
        resized.batch_size = size
        return (batch for epoch in itertools.count() for batch in resized.epoch(epoch) if len(batch[0]) == size)

    streams = {size: stream(size) for size in sizes}
    said = f"pictures: the training split of {dataset}, loaded and augmented as in training"
    return model, lambda size: next(streams[size]), True, [*notes, said]
