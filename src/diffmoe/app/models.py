"""The model files that the page offers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from diffmoe.config import UserError
from diffmoe.inference import Predictor
from diffmoe.model.parameters import parameter_counts
from diffmoe.storage.run_files import RunFiles
from diffmoe.visualization.language import say

KEPT_OPEN = 4
"""Models in memory at once; the one not asked for longest goes first."""


class Models:
    """Model files by the names that the page shows, each opened when it is asked for.

    Args:
        files: the files to offer, by their names without a folder where these differ; where there are none, all `*.pth`
            in `folder` and the folders in it.
        folder: the newest model comes first.
        device: where they compute.

    Raises:
        UserError: where there is no model file at all.
    """

    def __init__(self, files: Sequence[str], folder: Path, device: str) -> None:
        self.files = tuple(dict.fromkeys(files))
        self.folder = folder
        self.device = device
        if not self.names():
            raise UserError(f"{folder} has no model files (*.pth): train one first, or give --checkpoint FILE")

    def names(self) -> list[str]:
        """What can be chosen now, in the order to show."""
        return list(self._paths())

    def _paths(self) -> dict[str, Path]:
        if self.files:
            names = [Path(file).name for file in self.files]
            return dict(zip(names if len(set(names)) == len(names) else self.files, map(Path, self.files), strict=True))
        found = [path for path in self.folder.rglob("*.pth") if path.is_file()]
        found.sort(key=lambda path: (-path.stat().st_mtime_ns, path))
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def open(self, name: str | None) -> Predictor:
        """The model of that name. Raises `UserError` where it is not offered or cannot be opened."""
        path = self._path(name)
        return _open(str(path), path.stat().st_mtime_ns if path.exists() else 0, self.device)

    def _path(self, name: str | None) -> Path:
        paths = self._paths()
        if name not in paths:
            raise UserError(say("There is no model {name}: choose one of {names}.", name=name, names=", ".join(paths)))
        return paths[name]

    def is_classifier(self, name: str | None) -> bool:
        """Whether the model tells classes apart; otherwise it writes captions."""
        return self.open(name).has_classes

    def about(self, name: str | None) -> str:
        """What is loaded, as Markdown: its data, its size, and how well it did where its run says so."""
        path, used = self._path(name), self.open(name)
        config, info = used.model.config, used.info
        counts = parameter_counts(used.model)
        if used.has_classes:
            task = say("tells {count} classes apart", count=len(info.class_names))
        else:
            task = say("writes captions")
        if config.dense:
            experts = say("dense, no experts")
        else:
            experts = say(
                "{experts} experts, {top_k} for a patch", experts=config.num_general_experts, top_k=config.top_k
            )
        lines = [
            say("Dataset: **{dataset}**, {task}", dataset=_plain(info.dataset), task=task),
            say(
                "Parameters: **{total:,}**, {active:,} of them active",
                total=counts["parameters_total"],
                active=counts["parameters_active"],
            ),
            say(
                "Pictures: {size} × {size}, {grid} × {grid} patches",
                size=config.img_size,
                grid=config.img_size // config.patch_size,
            ),
            say("Blocks of the image tower: {blocks}, {experts}", blocks=config.img_encoder_layers, experts=experts),
            *_scores(path, used),
        ]
        return "\n".join(f"- {line}" for line in lines)


def _scores(path: Path, used: Predictor) -> list[str]:
    """What `metrics.json` beside a model file says of it; nothing where there is none."""
    metrics = RunFiles.beside(path).read_metrics()
    if metrics.get("dataset") != used.info.dataset:
        return []
    test, validation = metrics.get("test_accuracy", 0), metrics.get("val_accuracy", 0)
    if used.has_classes:
        tested = say("Test accuracy: **{value:.1%}**", value=test)
        validated = say("Validation accuracy: {value:.1%}", value=validation)
    else:
        tested = say("Next-token accuracy, test: **{value:.1%}**", value=test)
        validated = say("Next-token accuracy, validation: {value:.1%}", value=validation)
    written = {
        "test_accuracy": tested,
        "val_accuracy": validated,
        "zero_shot_accuracy": say("Zero-shot accuracy: {value:.1%}", value=metrics.get("zero_shot_accuracy", 0)),
        "cider": say("CIDEr: **{value:.3f}**", value=metrics.get("cider", 0)),
    }
    return [line for name, line in written.items() if name in metrics]


def _plain(text: str) -> str:
    """`text` with nothing in it that Markdown or HTML would read as its own."""
    return "".join(letter if letter.isalnum() or letter in " _-./" else "·" for letter in text)


@lru_cache(maxsize=KEPT_OPEN)
def _open(path: str, changed: int, device: str) -> Predictor:
    """A file that was `changed` (its time, in ns) is opened again."""
    return Predictor(path, device)
