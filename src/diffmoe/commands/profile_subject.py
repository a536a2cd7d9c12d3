"""What `profile` looks at: a model from a file or fresh from the settings, and batches for it, real or noise."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from diffmoe.checkpoint import Checkpoint, load_checkpoint
from diffmoe.commands import TASKS
from diffmoe.commands.captions import check_fusion
from diffmoe.commands.classification import class_tokens
from diffmoe.commands.preparation import check_fits
from diffmoe.config import EMBEDDED_DATASETS, HUB_DATASETS, UserError
from diffmoe.data import VOCAB_SIZE, check_dataset
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.profiling.throughput import Draw, Head
from diffmoe.settings import Settings
from diffmoe.training import Batches

CAPTIONED = ("flickr8k",)
"""The sets of the hub whose pictures have captions."""


@dataclass(frozen=True)
class Subject:
    """What is profiled."""

    model: Head
    draw: Draw
    load: Iterator[Sequence[Tensor]] | None
    """Training batches without end; None where there is no data."""
    notes: list[str]
    """What the pictures are, and the routing."""


def with_checkpoint(settings: Settings) -> tuple[Settings, Checkpoint | None]:
    """The settings as the model file has them, and the file; as they are where none is named. Raises `UserError`."""
    if settings.run.checkpoint is None:
        return settings, None
    loaded = load_checkpoint(settings.run.checkpoint)
    check_fits(settings, loaded.model.config, Path(settings.run.checkpoint))
    dataset = settings.data.dataset if "dataset" in settings.given else loaded.data.dataset
    data = dataclasses.replace(settings.data, dataset=dataset)
    return dataclasses.replace(settings, data=data, model=loaded.model.config), loaded


def find_subject(settings: Settings, loaded: Checkpoint | None, fabric: Fabric, most: int) -> Subject:
    """The model and its batches, of up to `most` pictures. Raises `UserError`.

    Real pictures where they are at hand without a download that nobody asked for; else noise, and a note that says so.
    """
    torch.manual_seed(settings.training.seed)
    notes = []
    if not settings.model.dense:
        notes += [f"routing: {'a fresh router, which training changes' if loaded is None else 'the trained router'}"]
    if not _has_data(settings, loaded):
        return _on_noise(settings, loaded, fabric, notes)
    parts = TASKS[check_dataset(settings.data)].prepare(settings, fabric)
    model, size = parts.model if loaded is None else loaded.model, settings.training.batch_size
    if type(model) is not type(parts.model) or model.config.num_classes != parts.model.config.num_classes:
        raise UserError(
            f"{settings.run.checkpoint} was trained for another task, or other classes, than those of "
            f"{parts.info.dataset}"
        )
    first = next(iter(parts.batches.epoch()))
    if len(first[0]) < size:
        raise UserError(f"batch_size is {size}: {parts.info.dataset} has {len(first[0])} training pictures")
    notes += [f"pictures: the training split of {parts.info.dataset}, loaded and augmented as in training"]
    return Subject(model, _pool_of(parts.batches, most), _endless(parts.batches), notes)


def _on_noise(settings: Settings, loaded: Checkpoint | None, fabric: Fabric, notes: list[str]) -> Subject:
    model = _fresh(settings) if loaded is None else loaded.model
    notes += ["pictures: noise, as no data was named (--data_dir takes a folder); loading of data is not measured"]
    if isinstance(model, Captioner):
        notes += [f"captions: random words, {model.config.max_text_len} tokens each"]
    elif loaded is None:
        notes += ["class descriptions: templates of made-up names"]
    return Subject(model, _noise(model, fabric.device), None, notes)


def _has_data(settings: Settings, loaded: Checkpoint | None) -> bool:
    data = settings.data
    if data.data_dir is not None or (loaded is not None and "dataset" in settings.given):
        return True
    # Without a model file a name tells the preset; what is no known name must be there, or be told so.
    fresh = loaded is None and data.dataset not in HUB_DATASETS
    return data.dataset in EMBEDDED_DATASETS or fresh or Path(data.dataset).is_dir()


def _fresh(settings: Settings) -> Head:
    """A model of the settings without its data: class descriptions from templates, all words to write."""
    config = settings.model
    if settings.data.dataset in CAPTIONED:
        check_fusion(config)
        return Captioner(config, torch.arange(VOCAB_SIZE))
    names = [f"class {number}" for number in range(config.num_classes)]
    return ImageClassifier(config, *class_tokens(settings.data.dataset, names, config.max_text_len))


def dense_twin(model: Head) -> Head | None:
    """The same model with each pool replaced by one expert top_k times as wide, freshly made; None for a dense one."""
    if model.config.dense:
        return None
    config = dataclasses.replace(model.config, dense=True)
    if isinstance(model, Captioner):
        return Captioner(config, model.output_tokens.cpu())
    return ImageClassifier(config, model.class_tokens, model.class_mask)


def _noise(model: Head, device: torch.device) -> Draw:
    """Batches of normal noise of the model's shape, with random labels or captions."""
    config = model.config

    def draw(size: int) -> Sequence[Tensor]:
        images = torch.randn(size, config.in_channels, config.img_size, config.img_size).to(device)
        if not isinstance(model, Captioner):
            return images, torch.randint(config.num_classes, (size,)).to(device)
        columns = torch.randint(len(model.output_tokens), (size, config.max_text_len))
        tokens = model.output_tokens.cpu()[columns].to(device)
        return images, tokens, torch.ones_like(tokens)

    return draw


def _endless(batches: Batches) -> Iterator[Sequence[Tensor]]:
    """Whole batches, epoch after epoch; the last one of an epoch, which is smaller, only where it is the only one."""
    for epoch in itertools.count():
        size = None
        for batch in batches.epoch(epoch):
            size = size or len(batch[0])
            if len(batch[0]) == size:
                yield batch


def _pool_of(batches: Batches, most: int) -> Draw:
    """Batches of any size up to `most`, drawn from real ones that are held in memory."""
    held: list[Sequence[Tensor]] = []
    for batch in _endless(batches):
        held.append(batch)
        if sum(len(part[0]) for part in held) >= most:
            break
    longest = max(part.shape[-1] for part in (batch[1] for batch in held))
    columns = [torch.cat([_fill(batch[n], longest, n) for batch in held]) for n in range(len(held[0]))]

    def draw(size: int) -> Sequence[Tensor]:
        rows = torch.randperm(len(columns[0]))[:size].to(columns[0].device)
        picked = [column[rows] for column in columns]
        if len(picked) < 3:
            return picked
        used = int(picked[2].sum(1).max())  # captions are cut to the batch's longest one
        return picked[0], picked[1][:, :used], picked[2][:, :used]

    return draw


def _fill(column: Tensor, longest: int, number: int) -> Tensor:
    """Captions filled up to the longest with padding; pictures and labels as they are."""
    if number == 0 or column.dim() == 1:
        return column
    return torch.nn.functional.pad(column, (0, longest - column.shape[1]))
