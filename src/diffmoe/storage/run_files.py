"""What a training run leaves on disk, and how the next one goes on from there.

`<save_dir>/<dataset>_model.pth` is the best model; `<save_dir>/<dataset>/` holds `last.ckpt` (all that an exact resume
needs), `metrics.json`, `history.csv` and TensorBoard's events.

A run's first model and `last.ckpt` are staged, and take the place of an earlier run's together (`RunFiles.replacing`):
whenever a run dies, there is a whole earlier one or a whole new one. What is told of an epoch is written after them.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffmoe.config import RunConfig, UserError, dataset_name
from diffmoe.files import as_json, check_writable, write_atomically

Metrics = dict[str, float]
"""Figures by name: a row of the history."""
STAGING = ".new"
"""In a run's folder: where its first files are until all of them are whole."""


class RunFiles:
    """The paths of one dataset's run."""

    def __init__(self, dataset: str, save_dir: str) -> None:
        name = dataset_name(dataset)
        self.model = Path(save_dir) / f"{name}_model.pth"
        self.folder = Path(save_dir) / name
        self.last = self.folder / "last.ckpt"
        self.metrics = self.folder / "metrics.json"
        self.history = self.folder / "history.csv"

    @classmethod
    def beside(cls, checkpoint: str | Path) -> RunFiles:
        """Those of the run that a model file is of: `a/b_model.pth` has them in `a/b`."""
        path = Path(checkpoint)
        return cls(path.stem.removesuffix("_model"), str(path.parent))

    def check(self, run: RunConfig) -> None:
        """Before work begins: nothing of an earlier run is in the way, and the folders can be written.

        Raises `UserError`.
        """
        self.replace_earlier()
        if run.resume and not self.last.is_file():
            raise UserError(f"resume: there is no {self.last} to go on from")
        if not (run.resume or run.overwrite):
            for path in self._written():
                raise UserError(f"{path} is an earlier run's: give --resume, --overwrite or another --save_dir")
        for path in self._written():
            if path.is_dir():
                raise UserError(f"{path} is a folder: training writes a file there; give another --save_dir")
        check_writable(self.model.parent)
        check_writable(self.folder)

    @contextmanager
    def replacing(self) -> Iterator[RunFiles]:
        """Files to write a run's first model and, after it, `last.ckpt` to: both take the place of an earlier run's.

        Where one of them cannot be written, the earlier run stays as it was.
        """
        staging = self.folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed in here
        try:
            yield self._staged()
        finally:
            self.replace_earlier()  # also where something failed after both were whole
            shutil.rmtree(staging, ignore_errors=True)

    def replace_earlier(self) -> None:
        """Where a run is staged, put it in the place of an earlier one, whose metrics, history and events go.

        `last.ckpt` is staged last and moved last: where it is staged, all is whole. What a process that was killed in
        here left undone, the next to call this does: whoever opens a run to go on from it, to replace it or to test it.
        Raises `UserError` where the files cannot be moved.
        """
        staged = self._staged()
        if not staged.last.exists():
            return
        try:
            for path in (self.metrics, self.history, *self._events()):
                path.unlink(missing_ok=True)
            for new, old in ((staged.model, self.model), (staged.last, self.last)):
                with suppress(FileNotFoundError):  # moved by the one who was killed
                    new.replace(old)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)

    def _staged(self) -> RunFiles:
        return RunFiles(self.folder.name, str(self.folder / STAGING))

    def _events(self) -> list[Path]:
        return sorted(self.folder.glob("events.out.tfevents.*"))

    def _written(self) -> list[Path]:
        return [p for p in (self.model, self.last, self.metrics, self.history, *self._events()) if p.exists()]

    def update_metrics(self, values: Mapping[str, Any]) -> None:
        """Merge into `metrics.json`, keeping what else is there."""
        # Metrics are of float32: digits past the sixth are noise.
        rounded = json.loads(json.dumps(values), parse_float=lambda digits: round(float(digits), 6))
        text = as_json({**self.read_metrics(), **rounded}, indent=2)
        write_atomically(self.metrics, lambda path: path.write_text(text, "utf-8"))

    def read_metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds; empty where there is none. Raises `UserError` where it is damaged."""
        if not self.metrics.exists():
            return {}
        try:
            found = json.loads(self.metrics.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.metrics} is not valid JSON: mend or remove it") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.metrics} is not a JSON object: mend or remove it")
        return found

    def write_history(self, rows: Iterable[Metrics]) -> None:
        """One line for each epoch; nan where a row has no such figure, as those of an earlier version may not."""
        rows = list(rows)
        names = list(dict.fromkeys(name for row in rows for name in row))

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=names, restval="nan")
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.history, write)

    def read_history(self) -> list[Metrics]:
        """The rows of `history.csv`; empty where there is none."""
        if not self.history.exists():
            return []
        with self.history.open(newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
