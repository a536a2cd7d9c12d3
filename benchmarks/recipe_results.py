"""What is kept of a recipe: several training runs that differ in their seeds alone, from what each left on disk."""

from __future__ import annotations

import json
import platform
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffmoe.comparison.make import routing_health
from diffmoe.comparison.page import SHORT, spread
from diffmoe.comparison.run import COMPARED
from diffmoe.comparison.statistics import summary
from diffmoe.config import UserError
from diffmoe.config.settings import GROUPS, Settings, parse_settings
from diffmoe.evaluation.history import router_health
from diffmoe.hardware import machine
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.storage.run_files import RunFiles
from diffmoe.visualization.comparison import metric_name

NEEDED = ("name", "dataset", "command", "seeds", "date", "machine", "test_accuracy", "train_seconds", "routing")
SCORES = (*COMPARED, "train_seconds", "images_per_second")
OF_THE_MACHINE = ("cpu", "gpu", "cores", "amx", "threads", "torch", "python")
"""Of a run's metrics: what its seconds depend on."""
OWN = {"seed", "save_dir", "resume", "overwrite", "checkpoint", "tta", *vars(GROUPS["visualization"]())}
"""Fields in which the runs of a recipe may differ; views (`tta`) are those of the test, which its metrics have."""


def recipe(name: str, folders: Sequence[Path], here: bool = False) -> dict[str, Any]:
    """What is kept of runs, each a `<save_dir>/<dataset>` folder; scores and costs are as an arm's in a comparison.

    Args:
        name: of the recipe.
        folders: of the runs.
        here: runs that do not say where they were made were made on this machine, with what is installed.

    Raises:
        UserError: where there are none, one is not tested or does not say where it was made, or they are not alike.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"the recipe is called {name!r}: it must be letters, digits, '_', '.' and '-'")
    if not folders:
        raise UserError(f"recipe {name} has no runs: give --run {name} RUN_DIR RUN_DIR …")
    runs = sorted((_run(folder, here) for folder in folders), key=lambda run: run[1].training.seed)
    (_, settings, first), metrics = runs[0], [of_run for _, _, of_run in runs]
    for files, own, of_run in runs:
        _check_alike(files, _fields(own), _fields(settings))
        _check_alike(files, *({key: one.get(key) for key in (*OF_THE_MACHINE, "tta")} for one in (of_run, first)))
    seeds = [own.training.seed for _, own, _ in runs]
    if len({*seeds}) < len(seeds):
        raise UserError(f"recipe {name} has seeds {' '.join(map(str, seeds))}: each must be there once")
    places = (Captioner if "i2t_r1" in first else ImageClassifier).decides_in
    health = [router_health(files.read_history(), places) for files, _, _ in runs]
    scores = [key for key in SCORES if all(key in one for one in metrics)]
    loads = [one["load"] for one in metrics if "load" in one]
    return {
        "name": name,
        "dataset": first["dataset"],
        "command": command(settings, first.get("tta", "none")),
        "seeds": seeds,
        "date": max(one["date"] for one in metrics),
        "machine": {**{key: first.get(key) for key in OF_THE_MACHINE}, "load": max(loads, default=None)},
        **{key: summary([one[key] for one in metrics])._asdict() for key in scores},
        **{key: [one[key] for one in metrics] for key in ("epochs", "steps")},
        **{key: first[key] for key in ("parameters_total", "parameters_active")},
        "routing": routing_health([rows[-1] for rows in health if rows]),
    }


def _run(folder: Path, here: bool) -> tuple[RunFiles, Settings, dict[str, Any]]:
    files = RunFiles(folder.name, str(folder.parent))
    metrics = files.read_metrics()
    if not files.config.is_file() or "test_accuracy" not in metrics:
        raise UserError(f"{folder} is no run that was trained and tested: give the <save_dir>/<dataset> of one")
    if "cpu" not in metrics:
        if not here:
            raise UserError(f"{files.metrics} does not say on which machine it was made: if on this one, give --here")
        metrics = {**_taken_to_be(files), **metrics}
    return files, parse_settings(["--config", str(files.config)], mode="train_test"), metrics


def _taken_to_be(files: RunFiles) -> dict[str, Any]:
    """Of a run of an earlier version, where it was made on this machine."""
    threads = re.match(r"# OMP_NUM_THREADS=(\d+) ", files.config.read_text(encoding="utf-8"))
    date = time.strftime("%Y-%m-%d", time.localtime(files.metrics.stat().st_mtime))
    on = {name: value for name, value in machine().items() if name != "load"}  # that of now says nothing
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {**on, **versions, "date": date, "threads": int(threads[1]) if threads else None}


def _fields(settings: Settings) -> dict[str, Any]:
    """All that makes the recipe, by name."""
    fields = {name: value for group in GROUPS for name, value in vars(getattr(settings, group)).items()}
    return {name: value for name, value in fields.items() if name not in OWN}


def _check_alike(files: RunFiles, own: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if value != first[name]:
            told = f"{name} is {value!r}, not {first[name]!r}"
            raise UserError(f"{files.folder} is not of the first run's recipe: {told}")


def command(settings: Settings, tta: str) -> str:
    """What repeats a run: the flags in which it differs from its dataset's own recipe and its preset."""
    begin = ["--dataset", settings.data.dataset]
    for name, value in (("data_dir", settings.data.data_dir), ("preset", settings.run.preset)):
        begin += [] if value is None else [f"--{name}", value]
    plain = {**_fields(parse_settings(begin, mode="train_test")), "tta": "none"}
    words = list(begin)
    for name, value in {**_fields(settings), "tta": tta}.items():
        if value != plain[name]:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(["diffmoe", "train_test", *words, "--seed", str(settings.training.seed)])


def section(recipes: Sequence[Mapping[str, Any]]) -> tuple[list[Sequence[str]], list[str]]:
    """A table with a row for each, with the metrics that any of them has; and of each how it was made."""
    metrics = [name for name in COMPARED if any(name in one for one in recipes)]
    heads = ("dataset", "recipe", *map(metric_name, metrics), "epochs", "seconds", "images/s", "parameters")
    rows: list[Sequence[str]] = [(*heads, "load, least to most", "flutter")]
    for one in recipes:
        routing = one["routing"] or {}
        cells = [spread(one[name], name) if name in one else "" for name in metrics]
        cells += [" or ".join(map(str, sorted({*one["epochs"]}))), spread(one["train_seconds"], "train_seconds")]
        cells += [spread(one["images_per_second"], "speed"), SHORT(one["parameters_total"])]
        cells += [f"{routing['min_load']:.2f} … {routing['max_load']:.2f}" if routing else ""]
        cells += [f"{routing['flutter']:.1%}" if "flutter" in routing else ""]
        rows.append((one["dataset"], one["name"], *cells))
    return rows, [_made(one) for one in recipes]


def _made(one: Mapping[str, Any]) -> str:
    on = one["machine"]
    load = "" if on["load"] is None else f", load {on['load']} at the end"
    return (
        f"- {one['dataset']}, {one['name']}: `{one['command']}`; seeds {' '.join(map(str, one['seeds']))}; "
        f"{computer(on)}, {on['threads']} threads{load}; torch {on['torch']}, Python {on['python']}; {one['date']}."
    )


def computer(machine: Mapping[str, Any]) -> str:
    """What seconds depend on."""
    runs_on = machine["gpu"] or f"{machine['cpu']}{', AMX' if machine['amx'] else ', no AMX'}"
    return f"{runs_on}, {machine['cores']} cores"
