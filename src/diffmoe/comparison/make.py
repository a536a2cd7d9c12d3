"""A comparison, made: arms of one size, their runs, a table of what came of them, figures and a page."""

from __future__ import annotations

import dataclasses
import itertools
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from diffmoe.comparison.arms import Arm, Match
from diffmoe.comparison.page import write_page
from diffmoe.comparison.run import COMPARED, Run, check, execute, plan
from diffmoe.comparison.sizing import TOLERANCE, sized
from diffmoe.comparison.statistics import paired_difference, summary
from diffmoe.config import ModelConfig, dataset_name
from diffmoe.data.loading import Dataset, load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.evaluation.history import router_health
from diffmoe.files import as_json, check_outside_data, check_writable, write_atomically
from diffmoe.hardware import machine
from diffmoe.model.heads import Head
from diffmoe.model.parameters import parameter_counts
from diffmoe.profiling.costs import flops_per_image
from diffmoe.storage.run_files import Metrics
from diffmoe.tasks import task_of_data
from diffmoe.visualization.language import Language

TIMES = ("train_seconds", "images_per_second")
COUNTS = ("epochs", "steps")
PACKAGES = ("diff-moe", "torch", "timm", "scipy")
COST_OF = {"flops": "flops_per_image", "seconds": "flops_per_image", "parameters": "parameters_total"}
"""What arms are brought to have equal; equal seconds come besides."""


def compare(
    arms: Sequence[Arm],
    *,
    seeds: int,
    match: Match = "flops",
    jobs: int = 1,
    lang: Language = "en",
    command: str = "",
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Train and test every arm with every seed, but for what is finished; write figures, page and `comparison.json`.

    Args:
        arms: at least two, as `parse_arms` returns them.
        seeds: how many, from the one that the settings have.
        match: what arms have equal; `seconds` gives each the training time that the first one took.
        jobs: runs at once.
        lang: of the page and its figures.
        command: what was typed.
        tell: gets lines for the user.

    Returns:
        What `comparison.json` holds.

    Raises:
        UserError: for settings, data or files that will not do.
        StopRequested, KeyboardInterrupt: when it was stopped; the same call goes on.
    """
    settings, equal_time = arms[0].settings, match == "seconds"
    folder = Path(settings.visualization.output_dir) / "compare" / dataset_name(settings.data.dataset)
    check_writable(folder)
    check_outside_data(folder, settings.data, "output_dir", "visualizations")
    check(arms, equal_time)
    data = load_dataset(settings.data, PictureSpec(settings.model.img_size, settings.model.in_channels))
    built = _Built(arms[0], data)
    arms = sized(arms, match, lambda config: built.costs(config)[COST_OF[match]])
    notes = _notes(arms, built, match, seeds)
    tell(data.summary())
    for line in (*_differences_told(arms), *(f"note: {note}" for note in notes)):
        tell(line)
    runs = plan(arms, seeds, data.fingerprint(), equal_time)
    _execute(runs, jobs, settings.run.overwrite, tell)
    by_arm = {arm.name: [run for run in runs if run.arm is arm] for arm in arms}
    health = {arm.name: _health(by_arm[arm.name], built.model(arm.settings.model).decides_in) for arm in arms}
    found = {
        "dataset": dataset_name(settings.data.dataset),
        "match": match,
        "seeds": [run.settings.training.seed for run in by_arm[arms[0].name]],
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**machine(), "threads": sorted({run.marked()["threads"] for run in runs}), "jobs": jobs},
        "versions": {"python": platform.python_version(), **_versions()},
        "arms": {arm.name: _measured(arm, arms[0], by_arm[arm.name], built, health[arm.name]) for arm in arms},
        "differences": [_difference(a, b, name, by_arm) for a, b, name in _pairs(arms, by_arm)],
        "notes": notes,
    }
    found |= write_page(folder, found, health, settings.visualization, lang)
    text = as_json(found, indent=2)
    write_atomically(folder / "comparison.json", lambda path: path.write_text(text, encoding="utf-8"))
    return found


class _Built:
    """Models as the runs build them, without any of their randomness reaching anybody."""

    def __init__(self, arm: Arm, data: Dataset) -> None:
        self.settings, self.data = arm.settings, data
        self.task = task_of_data(arm.settings.data)
        self._costs: dict[ModelConfig, dict[str, int]] = {}

    def model(self, config: ModelConfig) -> Head:
        with torch.random.fork_rng():
            return self.task.build(dataclasses.replace(self.settings, model=config), self.data)

    def costs(self, config: ModelConfig) -> dict[str, int]:
        """FLOPs of a picture, and parameters."""
        if config not in self._costs:
            model = self.model(config)
            with torch.random.fork_rng():
                flops = flops_per_image(model, lambda size: self.task.noise(model, size))
            self._costs[config] = {"flops_per_image": flops, **parameter_counts(model)}
        return self._costs[config]


def _execute(runs: Sequence[Run], jobs: int, overwrite: bool, tell: Callable[[str], object]) -> None:
    """With a progress bar; a line for each run where there is no terminal."""
    numbers = itertools.count(1)
    with tqdm(total=len(runs), desc="runs", unit="run", leave=False, disable=None) as bar:

        def advance(run: Run, before: bool) -> None:
            bar.update()
            done, name = next(numbers), compared([run])[0]
            if bar.disable:
                told = f"{run.arm.name}, seed {run.settings.training.seed}: {name} {run.metrics()[name]:.4f}"
                tell(f"run {done}/{len(runs)}: {told}{', finished before' if before else ''}")

        execute(runs, jobs, overwrite, advance)


def _health(runs: Sequence[Run], places: frozenset[str]) -> list[list[Metrics]]:
    return [router_health(run.files.read_history(), places) for run in runs]


def _measured(
    arm: Arm, first: Arm, runs: Sequence[Run], built: _Built, health: Sequence[Sequence[Metrics]]
) -> dict[str, Any]:
    metrics = [run.metrics() for run in runs]
    scores = [name for name in (*compared(runs), "val_accuracy", *TIMES) if all(name in of_run for of_run in metrics)]
    return {
        **{name: summary([of_run[name] for of_run in metrics])._asdict() for name in scores},
        **built.costs(arm.settings.model),
        **{name: [of_run[name] for of_run in metrics] for name in COUNTS},
        "differs": {name: value for name, (value, _) in arm.differs_from(first).items()},
        "routing": routing_health([rows[-1] for rows in health if rows]),
    }


def routing_health(rows: Sequence[Metrics]) -> dict[str, float] | None:
    """Of the last epochs of several runs, as `router_health` has them: None where nothing is routed.

    The least `min_load`, the most `max_load`, and the mean `flutter` of those where it is known.
    """
    if not rows:
        return None
    health = {"min_load": min(row["min_load"] for row in rows), "max_load": max(row["max_load"] for row in rows)}
    changed = [row["flutter"] for row in rows if "flutter" in row]
    return health | ({"flutter": fmean(changed)} if changed else {})


def compared(runs: Sequence[Run]) -> list[str]:
    """The metrics of `COMPARED` that all of them have."""
    return [name for name in COMPARED if all(name in run.metrics() for run in runs)]


def _pairs(arms: Sequence[Arm], by_arm: dict[str, list[Run]]) -> list[tuple[str, str, str]]:
    # Each other arm against the first: all pairs would be many tests of one question.
    names = compared([run for of_arm in by_arm.values() for run in of_arm])
    return [(arms[0].name, other.name, name) for name in names for other in arms[1:]]


def _difference(a: str, b: str, name: str, by_arm: dict[str, list[Run]]) -> dict[str, Any]:
    values = [[run.metrics()[name] for run in by_arm[arm]] for arm in (a, b)]
    return {"a": a, "b": b, "metric": name, **paired_difference(*values)._asdict()}


def _notes(arms: Sequence[Arm], built: _Built, match: Match, seeds: int) -> list[str]:
    name = COST_OF[match]
    target = built.costs(arms[0].settings.model)[name]
    notes = []
    for arm in arms[1:]:
        ratio = built.costs(arm.settings.model)[name] / target
        if abs(ratio - 1) > TOLERANCE:
            notes.append(f"{arm.name} has {ratio:.2f} times the {name} of {arms[0].name}")
    if seeds < 2:
        notes.append("one seed tells no difference from chance: there is neither an interval nor a p; give --seeds 5")
    if len(arms) > 2:
        notes.append("the p values are not corrected for the number of arms")
    if match == "seconds":
        notes.append("what is learned in a given time depends on the machine's speed: such runs repeat only about")
    return notes


def _differences_told(arms: Sequence[Arm]) -> list[str]:
    first = arms[0]
    return [
        f"{arm.name} differs from {first.name} in "
        + ", ".join(f"{name} {own!r} ({theirs!r})" for name, (own, theirs) in arm.differs_from(first).items())
        for arm in arms[1:]
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found
