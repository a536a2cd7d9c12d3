"""`profile`: what a model costs, as tables, pictures, a trace and JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diffmoe.commands.preparation import check_vocabulary, pictures_folder
from diffmoe.commands.profile_subject import Subject, dense_twin, find_subject, with_checkpoint
from diffmoe.config import UserError
from diffmoe.files import check_outside_data, check_writable, write_atomically
from diffmoe.hardware import keep_freed_memory, make_fabric, use_fast_matmul
from diffmoe.profiling.profile import Profile, Totals, profile_model
from diffmoe.profiling.throughput import Contender, Head, ratio
from diffmoe.settings import Settings


def profile(settings: Settings, batch_sizes: Sequence[int], steps: int, trace: bool) -> dict[str, Any]:
    """Profile a model file, or a fresh model of the settings; writes the pictures and the trace.

    Returns what `--json` prints. Raises `UserError`.
    """
    if settings.run.device == "mps":
        raise UserError("device is 'mps': torch's profiler sees the parts on cpu and on cuda only")
    settings, loaded = with_checkpoint(settings)
    check_writable(pictures_folder(settings))
    check_outside_data(pictures_folder(settings), settings.data, "output_dir", "visualizations")
    check_vocabulary(settings.model)
    fabric = make_fabric(dataclasses.replace(settings.run, num_devices=1))
    use_fast_matmul()
    keep_freed_memory()
    subject = find_subject(settings, loaded, fabric, max(*batch_sizes, settings.training.batch_size))
    twin = dense_twin(subject.model)
    moe = Contender(subject.model, settings.training, fabric)
    dense = None if twin is None else Contender(twin, settings.training, fabric)
    folder = pictures_folder(settings) / "profile"
    trace_path = folder / "trace.json" if trace else None
    found = _run(moe, dense, subject, settings, batch_sizes, steps, trace_path)
    pictures = _draw(found, folder, settings)
    result = as_json(found, subject.model) | {
        "dataset": settings.data.dataset,
        "checkpoint": settings.run.checkpoint,
        "device": str(fabric.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "notes": [*subject.notes, *_notes(found, fabric.device)],
        "pictures": [str(path) for path in pictures],
        "trace": None if trace_path is None else str(trace_path),
    }
    return result


def _run(
    moe: Contender,
    dense: Contender | None,
    subject: Subject,
    settings: Settings,
    batch_sizes: Sequence[int],
    steps: int,
    trace: Path | None,
) -> Profile:
    def go(unfinished: Path | None) -> Profile:
        size = settings.training.batch_size
        return profile_model(moe, dense, subject.draw, subject.load, size, batch_sizes, steps, unfinished, _tell)

    if trace is None:
        return go(None)
    results: list[Profile] = []
    write_atomically(trace, lambda unfinished: results.append(go(unfinished)))
    return results[0]


def _tell(what: str) -> None:
    print(f"\r\033[K{what} ...", end="", file=sys.stderr, flush=True) if sys.stderr.isatty() else None


def _draw(found: Profile, folder: Path, settings: Settings) -> list[Path]:
    from diffmoe.visualization import figures
    from diffmoe.visualization import profile as drawn

    costs = found.grouped()
    made = {
        "time": drawn.time_by_part(costs),
        "memory": drawn.memory_by_part(costs),
        "flops": drawn.flops_against_time(costs),
        "throughput": drawn.throughput(found.speeds),
        "table": drawn.cost_table(costs, found.batch_size),
    }
    show = settings.visualization
    return [figures.save(figure, folder / f"{name}.{show.figure_format}", show.dpi) for name, figure in made.items()]


def _notes(found: Profile, device: torch.device) -> list[str]:
    """How each number was come by."""
    times = "the operations and the Python around them" if device.type == "cpu" else "the kernels"
    peak = (
        "torch's allocator as the profiler recorded it" if device.type == "cpu" else "torch.cuda.max_memory_allocated"
    )
    return [
        "FLOPs: counted by hand from the settings, 2 m n k for a product, convolutions as products, nothing else; "
        "experts by the slots that were routed, rows that fill their products up apart",
        f"times: medians of {found.steps} training steps under torch.profiler, of {times}; the learning rate is 0",
        f"memory: peak by {peak}, over weights and optimizer state; held: what a part's forward leaves allocated",
        f"throughput: medians of {found.steps} rounds, without the profiler; inference of a classifier has read its "
        "class descriptions before, that of a captioner reads given captions",
    ]


def as_json(found: Profile, model: Head) -> dict[str, Any]:
    """The profile as one object of numbers and names."""
    by_key = {(speed.model, speed.mode, speed.batch_size): speed for speed in found.speeds}
    speeds = []
    for (name, mode, size), speed in by_key.items():
        row = {"model": name, "mode": mode, "batch_size": size, "ms": 1000 * median(speed.seconds)}
        row["images_per_second"] = speed.images_per_second
        if name == "moe" and (base := by_key.get(("dense", mode, size))) is not None:
            row["time_over_dense"] = ratio(speed, base)
        speeds.append(row)
    return {
        "task": found.work.task,
        "model": dataclasses.asdict(model.config),
        "batch_size": found.batch_size,
        "steps": found.steps,
        **_totals(found.totals),
        "dense": None if found.dense is None else _totals(found.dense),
        "step_ms": found.step_ms,
        "remainder_ms": found.remainder_ms,
        "weight_bytes": found.weight_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "peak_bytes": found.peak_bytes,
        "backends": dict(found.work.backends),
        "parts": [dataclasses.asdict(cost) | {"ms": cost.ms} for cost in found.parts],
        "grouped": [dataclasses.asdict(cost) | {"ms": cost.ms} for cost in found.grouped()],
        "throughput": speeds,
    }


def _totals(totals: Totals) -> dict[str, float]:
    return {
        "parameters_total": totals.parameters,
        "parameters_active": totals.parameters_active,
        "inference_flops_per_image": totals.inference_flops,
        "training_flops_per_image": totals.training_flops,
        "padding_flops_per_image": totals.padding_flops,
    }
