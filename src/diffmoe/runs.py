"""A run is a function: settings in, metrics out. What a command prints of it, it is handed (`tell`).

import diffmoe
metrics = diffmoe.train(dataset="digits", epochs=3)     # the flags of `diffmoe train`
metrics = diffmoe.test(dataset="digits")
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import random
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from diffmoe.config import ModelConfig, UserError, dataset_name
from diffmoe.config.settings import Settings, as_yaml, parse_settings
from diffmoe.data.loading import Dataset, load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.evaluation.experts import trace_experts
from diffmoe.evaluation.history import first_experts, flutter, routing_metrics
from diffmoe.files import check_outside_data, check_writable, write_atomically
from diffmoe.hardware import Threads, machine, pick_device, tuned
from diffmoe.model.heads import Head
from diffmoe.model.moe import routed_pools
from diffmoe.model.parameters import parameter_counts
from diffmoe.storage.model_files import DataInfo, load_model_file
from diffmoe.storage.run_files import RunFiles
from diffmoe.tasks import task_of_data, task_of_model
from diffmoe.tasks.base import Runtime, Task
from diffmoe.training.display import as_figure
from diffmoe.training.epoch_log import EpochLog
from diffmoe.training.loop import Hooks, Progress, StopRequested, fit
from diffmoe.training.objective import Trainee
from diffmoe.training.parallel import make_fabric, one_ends_all, share_buffers, together
from diffmoe.training.saving import DATA, Saver, load_run
from diffmoe.training.sizes import picture_size

log = logging.getLogger(__name__)

Tell = Callable[[str], object]
HOUR = 3600
WHITENING_SAMPLE, WHITENING_VALUES = 5000, 2**25
"""Training pictures that a stem is whitened by, and how many values they may have in all: fewer of large ones."""
ROUTED_SAMPLE, ROUTED_VALUES = 256, 2**22
"""The same of those whose tokens routers start at, where experts are made of a dense model."""
ELSEWHERE = ("data_dir", "num_workers", "max_memory_gb", "check")
"""Settings that a resumed run may have others of: they say where the data is and how it is read."""


def train(*, quiet: bool = False, **flags: Any) -> dict[str, Any]:
    """Train a model; the flags are those of `diffmoe train`, as in `train(dataset="digits", epochs=3)`.

    Whatever it changes for the process (signals, torch's settings and generators) is put back.
    With `num_devices` over 1 each process runs the whole script that calls this, and gets the same metrics.

    Args:
        quiet: print nothing.
        flags: any field of any config.

    Returns:
        What `metrics.json` holds.

    Raises:
        UserError: for settings, data or files that will not do.
        KeyboardInterrupt: when it was stopped; the run is saved, and `resume=True` goes on.
    """
    try:
        return train_run(_settings("train", flags), silent if quiet else print)
    except StopRequested as stop:
        raise KeyboardInterrupt(str(stop)) from stop


def test(*, quiet: bool = False, **flags: Any) -> dict[str, Any]:
    """Score a model file on the test split of its data; the flags are those of `diffmoe test`. As `train`."""
    return test_run(_settings("test", flags), silent if quiet else print)


def train_run(settings: Settings, tell: Tell = print) -> dict[str, Any]:
    """Train: writes the best model, what a resume needs, the history and the metrics.

    Returns what `metrics.json` holds, in all processes of the run. Raises `UserError`, `StopRequested`.
    """
    seed, files = settings.training.seed, RunFiles(settings.data.dataset, settings.run.save_dir)
    task = check_run(settings, trains=True)
    with _clean() as threads, ExitStack() as stack:
        fabric = make_fabric(settings.run)
        stack.enter_context(one_ends_all(fabric))
        picture = PictureSpec(settings.model.img_size, settings.model.in_channels)
        told: Tell = tell if fabric.is_global_zero else silent
        shown = fabric.is_global_zero
        # The first one alone: the others find the cache that it made.
        data = together(fabric, lambda: load_dataset(settings.data, picture, progress=shown), first_alone=True)
        batches = task.training_batches(settings, data, fabric.device, fabric.global_rank, fabric.world_size)
        sample = next(iter(batches.epoch()))  # before the seed is set: workers draw from torch's generator
        torch.manual_seed(seed)
        model = task.build(settings, data)
        _check_last_batch(settings, model, len(data.train), fabric.world_size)
        _start_from(settings, model, data, told)
        of_classes = task.super_classes(settings, data), task.class_weights(settings, data)
        trainee = Trainee(fabric, model, settings.training, *of_classes)
        # Weights are equal on all ranks; dropout and the descriptions drawn from here on are not.
        torch.manual_seed(seed + 1 + fabric.global_rank)
        shared = _shared(settings, model, data, fabric)
        progress = load_run(files.last, trainee, shared, told) if settings.run.resume else Progress()
        _introduce(task, model, data, fabric, told)
        _tell_of_threads(threads, fabric, told)
        info, config = DataInfo.of(data, settings.data), _config_file(settings, files)
        saver = Saver(files, trainee, info, shared, config, is_first=not settings.run.resume)
        epochs = EpochLog(files, settings, model, data.picture, sample, told, silent=not fabric.is_global_zero)
        runtime = Runtime(fabric.device, settings.data.num_workers, fabric.autocast)
        validation = task.in_order(model.config, data.validation, data.picture, runtime)

        def validate() -> dict[str, float]:
            for one in dict.fromkeys((model, trainee.evaluated)):  # not a set: all ranks need one order
                share_buffers(fabric, one)
            return task.validate(trainee.evaluated, validation, fabric.autocast)

        def save(progress: Progress) -> None:
            if progress.window == 0:  # an epoch ends: where the experts' load is by now, on the same batch each time
                blocks = epochs.see(trace_experts(trainee.evaluated, [sample], fabric.autocast))
                before, progress.first_experts = progress.first_experts, first_experts(blocks)
                progress.history[-1] |= routing_metrics(blocks) | flutter(before, progress.first_experts)
            saver.save(progress)

        hooks = Hooks(
            validate, save, epochs.write, lambda seconds: _warn_if_slow(fabric, settings, seconds, told), told
        )
        begun_at = progress.step
        with epochs.going_on(progress):
            fit(trainee, batches, hooks, progress)
        if shown and (progress.step > begun_at or "date" not in files.read_metrics()):
            files.update_metrics(_made())
        told(f"best model: {files.model}   metrics: {files.metrics}")
        return fabric.broadcast(files.read_metrics() if fabric.is_global_zero else {})


def test_run(settings: Settings, tell: Tell = print, draw: bool = True) -> dict[str, Any]:
    """Score a model file on the test split: updates `metrics.json`, draws the pictures (`draw`), tells the figures.

    Returns what `metrics.json` holds. Raises `UserError`.
    """
    if settings.mode == "test" and settings.run.num_devices > 1:
        raise UserError(f"num_devices is {settings.run.num_devices}: testing runs on 1")
    files = RunFiles(settings.data.dataset, settings.run.save_dir)
    path = Path(settings.run.checkpoint or files.model)
    pictures = pictures_folder(settings)
    task = check_run(settings, trains=False)
    files.replace_earlier()
    check_writable(files.folder)
    files.read_metrics()  # damaged, these would fail after the work
    files.read_history()
    with _clean() as threads:
        loaded = load_model_file(path)
        model, info = loaded.model, loaded.data
        info.check_source(settings.data, path)
        if task_of_model(model) is not task:
            raise UserError(f"{path} was trained on {info.dataset}, for another task than {settings.data.dataset}'s")
        check_fits(settings, model.config, path)
        fabric = make_fabric(dataclasses.replace(settings.run, num_devices=1))
        data = load_dataset(info.split_as_trained(settings.data), loaded.picture)
        if data.class_names != info.class_names:
            raise UserError(f"{path} was trained on the classes of {info.dataset}, not on those of {data.name}")
        data = dataclasses.replace(data, picture=loaded.picture)
        if settings.mode == "test":  # after training it was told
            _tell_of_threads(threads, fabric, tell)
        runtime = Runtime(fabric.device, settings.data.num_workers, fabric.autocast)
        tested = task.test(model.to(fabric.device), data, runtime, settings, loaded.temperature)
        files.update_metrics({"dataset": data.name, "mode": settings.mode, **parameter_counts(model), **tested.metrics})
        if draw:
            _draw(tested.figures, files, pictures, settings, task)
        for name, text in tested.texts.items():
            write_atomically(pictures / name, lambda unfinished, text=text: unfinished.write_text(text, "utf-8"))
    tell(f"test, {len(data.test):,} pictures")
    for line in task.report_lines(tested.metrics, data):
        tell(line)
    tell(f"metrics: {files.metrics}   pictures: {pictures}/")
    return files.read_metrics()


def check_run(settings: Settings, trains: bool) -> Task:
    """The task of the data, once everything has been looked at that can be before the data is read.

    Raises `UserError`.
    """
    pick_device(settings.run.device)
    files, pictures = RunFiles(settings.data.dataset, settings.run.save_dir), pictures_folder(settings)
    tests = settings.mode != "train"
    if tests:
        check_writable(pictures)
    task = task_of_data(settings.data)
    check_outside_data(files.folder, settings.data, "save_dir", "checkpoints")
    if tests:
        check_outside_data(pictures, settings.data, "output_dir", "visualizations")
        task.check_test(settings.run, pictures)
    if trains:
        if settings.run.checkpoint is not None:
            raise UserError("checkpoint is for test: training writes <save_dir>/<dataset>_model.pth")
        try:
            str(files.folder).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{files.folder} is not UTF-8, as TensorBoard needs it: rename it") from error
        files.check(settings.run)
        task.check(settings)
    return task


def _check_last_batch(settings: Settings, model: Head, pictures: int, world_size: int) -> None:
    """BatchNorm learns from no single value. Raises `UserError` where a training batch would bring it one a channel."""
    share = settings.training.batch_size // world_size
    last = -(-pictures // world_size) % share or share
    smallest = picture_size(0, 1, settings.training, model.config) or model.config.img_size
    one_patch = smallest == model.config.patch_size
    if last == 1 and one_patch and any(isinstance(m, BatchNorm) for m in model.modules()):
        raise UserError(
            f"batch_size is {settings.training.batch_size}: a batch of the {pictures} training pictures would be a "
            "single one, of a single patch, which BatchNorm (as of patch_embed 'conv') cannot learn from; give another"
        )


def check_fits(settings: Settings, config: ModelConfig, path: Path) -> None:
    """Raises `UserError` where the user asked for a model that is not the one in the file."""
    for name in sorted(settings.given & {field.name for field in dataclasses.fields(ModelConfig)}):
        asked, found = getattr(settings.model, name), getattr(config, name)
        if asked != found:
            raise UserError(f"{name} is {asked!r}: the model in {path} has {found!r}")


def pictures_folder(settings: Settings) -> Path:
    """Where this run's pictures go."""
    return Path(settings.visualization.output_dir) / dataset_name(settings.data.dataset)


@contextmanager
def _clean() -> Iterator[Threads]:
    """What a run changes for the whole process is put back after it."""
    state = random.getstate()  # which libraries move, as they are imported
    with torch.random.fork_rng(), tuned() as threads:
        try:
            yield threads
        finally:
            random.setstate(state)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _settings(mode: str, flags: Mapping[str, object]) -> Settings:
    words = {name: str(v) if isinstance(v, str | Path) else json.dumps(v) for name, v in flags.items()}
    return parse_settings([f"--{name}={word}" for name, word in words.items()], prog=f"diffmoe.{mode}", mode=mode)


def _start_from(settings: Settings, model: Head, data: Dataset, tell: Tell) -> None:
    """What a new model has before it is trained: whitened pictures, pretrained weights, experts alike."""
    if settings.run.resume:
        return
    pools = routed_pools(model).values()
    if settings.training.dense_fraction > 0 or settings.training.expert_sharing > 0:
        for pool in pools:
            pool.make_alike()
    if settings.model.patch_embed == "whitened":
        model.backbone.patch_embed.whiten(_first_pictures(data, WHITENING_SAMPLE, WHITENING_VALUES))
    if settings.run.init is not None:
        from diffmoe.pretrained import start_from

        pictures = _first_pictures(data, ROUTED_SAMPLE, ROUTED_VALUES)
        for line in start_from(model, settings.run.init, pictures, data.class_names):
            tell(line)
    if settings.training.dense_fraction > 0 and not all(pool.is_alike for pool in pools):
        raise UserError(
            f"dense_fraction is {settings.training.dense_fraction}: it must be 0 with --init {settings.run.init}, of "
            "which come experts that are unlike: their mean is none of them"
        )


def _first_pictures(data: Dataset, most: int, most_values: int) -> Tensor:
    """Of training, normalised, one at least."""
    first = min(most, max(1, most_values // data.train.images[:1].numel()))
    return data.picture.normalize(data.train.images[:first])


def _shared(settings: Settings, model: Head, data: Dataset, fabric: Fabric) -> dict[str, object]:
    """What decides how a run goes on: a resumed one must have it in common with the one that it resumes."""
    groups = (model.config, settings.training, settings.data)
    fields = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
    precision = fabric.strategy.precision.precision
    kept = {name: value for name, value in fields.items() if name not in ELSEWHERE}
    # By name: the path that led to the data may be another by now.
    return {**kept, "dataset": data.name, "precision": precision, DATA: data.fingerprint()}


def _introduce(task: Task, model: Head, data: Dataset, fabric: Fabric, tell: Tell) -> None:
    counts = parameter_counts(model)
    number_format = " in bfloat16" if fabric.strategy.precision.precision == "bf16-mixed" else ""
    tell(data.summary())
    tell(
        f"model: {counts['parameters_total'] / 1e6:.2f} M parameters, "
        f"{counts['parameters_active'] / 1e6:.2f} M active for a token; on {fabric.device}{number_format}"
    )
    for note in task.notes(model.config):
        tell(f"note: {note}")


def _tell_of_threads(threads: Threads, fabric: Fabric, tell: Tell) -> None:
    """Where they are fewer than the cores, and this process has chosen them alone."""
    if (count := torch.get_num_threads()) != threads.count and fabric.world_size == 1:
        tell(f"threads: {count}, as the run began with")
    elif threads.why and fabric.world_size == 1 and fabric.device.type == "cpu":
        tell(threads.why)


def _made() -> dict[str, Any]:
    """When, on what machine and with what: without these, a run's seconds say nothing."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), **machine(), **versions}


def _config_file(settings: Settings, files: RunFiles) -> str:
    """`config.yaml`, with the command that repeats the run."""
    threads = torch.get_num_threads()  # the last bit of a sum depends on how many made it
    command = f"OMP_NUM_THREADS={threads} diffmoe {settings.mode} --config {shlex.quote(str(files.config))}"
    return "".join(f"# {line}\n" for line in command.splitlines()) + as_yaml(settings)


def _draw(figures: Mapping[str, Figure], files: RunFiles, folder: Path, settings: Settings, task: Task) -> None:
    from diffmoe.visualization import figures as drawn

    show = settings.visualization
    if history := files.read_history():
        figures = {**figures, "training_curves": drawn.training_curves(history, task.curve)}
    for name, figure in figures.items():
        drawn.save(figure, folder / f"{name}.{show.figure_format}", dpi=show.dpi)


def _warn_if_slow(fabric: Fabric, settings: Settings, seconds: float, tell: Tell) -> None:
    if seconds > HOUR and fabric.device.type == "cpu":
        smaller = "" if settings.run.preset == "tiny" else "; --preset tiny, made for a CPU, takes minutes"
        tell(f"note: about {as_figure(seconds / HOUR)} hours on this processor{smaller}")


def silent(_line: str) -> None:
    """Tells nothing."""
