"""Pictures a second from the data loader: `python benchmarks/data.py [--json] [--dataset NAME --data_dir DIR]`.

In memory: indexed, cropped, mirrored and normalised, as in training. Streamed: JPEG files decoded by worker processes,
then the same. Pictures are synthetic unless `--dataset` names a set. Beside them the training step of the `tiny`
preset, which the loader must outrun: interleaved in one process, so that the ratio holds on a noisy machine.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from classifiers import TrainingStep, classifier, preset_config
from PIL import Image
from tables import Row, judged, show

from diffmoe.config import DataConfig
from diffmoe.data.batches import Batches
from diffmoe.data.folders import FilePictures
from diffmoe.data.loading import load_dataset
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.splits import Split
from diffmoe.hardware import keep_freed_memory

NOTES = ["in memory: one uint8 tensor; streamed: JPEG files, decoded by worker processes. Both cropped and mirrored."]


def main(argv: list[str] | None = None) -> None:
    """Print the table, or with `--json` an object."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        splits = real_splits(args) if args.dataset else synthetic_splits(args, Path(folder))
        training = Training(splits["in_memory"], args)
        rounds = [
            {"training step": training.measure(), **{name: measure(split, args) for name, split in splits.items()}}
            for _ in range(args.epochs)
        ]
    rows: list[Row] = []
    for name in rounds[0]:
        ratio = median(speeds[name] / speeds["training step"] for speeds in rounds)
        goal = None if name == "training step" else 1.0
        speed = {"pictures": name.replace("_", " "), "a_second": median(speeds[name] for speeds in rounds)}
        rows.append({**speed, "over": "training step", **judged(ratio, at_least=goal)})
    show("data", args, {"Pictures a second": rows}, NOTES)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", default=None, help="a real set; default: synthetic pictures")
    parser.add_argument("--data_dir", default=None, help="where it is")
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--in_channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=10000, help="synthetic pictures; at most so many of a real set")
    parser.add_argument(
        "--file_size", type=int, default=None, help="size of the synthetic JPEG files; default: img_size"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that decode the streamed pictures")
    parser.add_argument("--epochs", type=int, default=3, help="rounds; medians count")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def real_splits(args: argparse.Namespace) -> dict[str, Split]:
    """The set's training pictures, in memory and streamed."""
    splits = {}
    for name, limit in (("in_memory", 64.0), ("streamed", 0.0)):
        config = DataConfig(dataset=args.dataset, data_dir=args.data_dir, max_memory_gb=limit)
        train = load_dataset(config, spec(args)).train
        splits[name] = train.subset(torch.arange(min(len(train), args.pictures)))
    return splits


def synthetic_splits(args: argparse.Namespace, folder: Path) -> dict[str, Split]:
    """Smooth random pictures, in memory and as JPEG files in `folder`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(args.pictures, dtype=torch.int64)
    shape = (args.pictures, args.in_channels, args.img_size, args.img_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    size = args.file_size or args.img_size
    names = tuple(f"{number}.jpg" for number in range(args.pictures))
    for name in names:
        noise = torch.randint(0, 256, (4, 4, args.in_channels), dtype=torch.uint8, generator=generator).squeeze(-1)
        Image.fromarray(noise.numpy()).resize((size, size)).save(folder / name)
    lazy = LazyImages.of(FilePictures(folder, names), spec(args))
    return {"in_memory": Split(images, labels), "streamed": Split(lazy, labels)}


def spec(args: argparse.Namespace) -> PictureSpec:
    """What a picture is to the model; the statistics do not matter here."""
    half = (0.5,) * args.in_channels
    return PictureSpec(args.img_size, args.in_channels, half, half)


def measure(split: Split, args: argparse.Namespace) -> float:
    """Pictures per second over one epoch of the loader alone."""
    augment = DataConfig(crop_padding=min(4, args.img_size - 1), flip=True)
    batches = Batches(
        split, args.batch_size, picture=spec(args), shuffle=True, augment=augment, num_workers=args.workers
    )
    start = time.perf_counter()
    for _ in batches.epoch():
        pass
    return len(split) / (time.perf_counter() - start)


class Training:
    """The `tiny` preset's whole training step on these pictures."""

    def __init__(self, split: Split, args: argparse.Namespace) -> None:
        config = preset_config("tiny", "cifar10", img_size=args.img_size, in_channels=args.in_channels)
        keep_freed_memory()
        self.step = TrainingStep(classifier(config))
        self.batches = Batches(split, args.batch_size, picture=spec(args), shuffle=True)
        self.steps = 10

    def measure(self) -> float:
        """Pictures per second over some steps, the loader's time left out."""
        batches = list(itertools.islice(self.batches.epoch(), self.steps))
        start = time.perf_counter()
        for batch in batches:
            self.step(batch)
        return sum(len(batch.images) for batch in batches) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
