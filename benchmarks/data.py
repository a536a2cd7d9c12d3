"""Pictures a second from the data loader: `python benchmarks/data.py [--json] [--dataset NAME --data_dir DIR]`.

In memory: indexed, cropped, mirrored and normalised, as in training. Streamed: JPEG files decoded by worker processes,
then the same. Pictures are synthetic unless `--dataset` names a set. Beside them the training step of the `tiny`
preset, which the loader must outrun: interleaved in one process, so that the ratio holds on a noisy machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from lightning_fabric import Fabric
from PIL import Image

from diffmoe.config import DataConfig, ModelConfig, TrainingConfig
from diffmoe.data import Augmentation, Batches, LazyImages, Split, load_dataset
from diffmoe.data.folders import FilePictures
from diffmoe.hardware import keep_freed_memory, use_fast_matmul
from diffmoe.model.heads import ImageClassifier
from diffmoe.recipes import recipe
from diffmoe.training import ClassificationObjective, make_optimizer, train_step


def main() -> None:
    """Print a table, or with `--json` an object."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        splits = real_splits(args) if args.dataset else synthetic_splits(args, Path(folder))
        step = TrainingStep(splits["in_memory"], args)
        rounds = [
            {"training_step": step.measure(), **{name: measure(split, args) for name, split in splits.items()}}
            for _ in range(args.epochs)
        ]
    speeds = {f"{name}_pictures_per_second": round(median(r[name] for r in rounds)) for name in rounds[0]}
    ratios = {f"{name}_over_training_step": median(r[name] / r["training_step"] for r in rounds) for name in splits}
    speeds |= {name: round(ratio, 1) for name, ratio in ratios.items()}
    settings = {key: vars(args)[key] for key in ("dataset", "img_size", "in_channels", "batch_size", "workers")}
    if args.json:
        print(json.dumps({**settings, "threads": torch.get_num_threads(), **speeds}))
    else:
        print(", ".join(f"{key} {value}" for key, value in settings.items()), f"threads {torch.get_num_threads()}")
        for name, speed in speeds.items():
            print(f"{name:38} {speed:>10,}")


def parse_args() -> argparse.Namespace:
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
    return parser.parse_args()


def real_splits(args: argparse.Namespace) -> dict[str, Split]:
    """The set's training pictures, in memory and streamed."""
    splits = {}
    for name, limit in (("in_memory", 64.0), ("streamed", 0.0)):
        config = DataConfig(dataset=args.dataset, data_dir=args.data_dir, max_memory_gb=limit)
        train = load_dataset(config, img_size=args.img_size, in_channels=args.in_channels).train
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
    lazy = LazyImages.of(FilePictures(folder, names), args.img_size, args.in_channels)
    return {"in_memory": Split(images, labels), "streamed": Split(lazy, labels)}


def measure(split: Split, args: argparse.Namespace) -> float:
    """Pictures per second over one epoch of the loader alone."""
    channels = [0.5] * args.in_channels
    augment = Augmentation(crop_padding=min(4, args.img_size - 1), flip=True)
    batches = Batches(
        split, args.batch_size, mean=channels, std=channels, shuffle=True, augment=augment, num_workers=args.workers
    )
    start = time.perf_counter()
    for _ in batches.epoch():
        pass
    return len(split) / (time.perf_counter() - start)


class TrainingStep:
    """The `tiny` preset's whole training step on these pictures."""

    def __init__(self, split: Split, args: argparse.Namespace) -> None:
        fields = recipe("cifar10", "tiny") | {"img_size": args.img_size, "in_channels": args.in_channels}
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        use_fast_matmul()
        keep_freed_memory()
        tokens = torch.randint(1000, 40000, (10, 6, 20), generator=torch.Generator().manual_seed(0))
        model = ImageClassifier(ModelConfig(**{k: v for k, v in fields.items() if k in known}), tokens)
        self.fabric = Fabric(accelerator="cpu", devices=1)
        self.objective, self.optimizer = self.fabric.setup(
            ClassificationObjective(model), make_optimizer(model, TrainingConfig())
        )
        half = [0.5] * args.in_channels
        self.batches = Batches(split, args.batch_size, mean=half, std=half, shuffle=True)
        self.steps = 10

    def measure(self) -> float:
        """Pictures per second over some steps, the loader's time left out."""
        batches = list(itertools.islice(self.batches.epoch(), self.steps))
        start = time.perf_counter()
        for batch in batches:
            train_step(self.fabric, self.objective, self.optimizer, [batch], rate=1e-3, clip_norm=1.0)
        return sum(len(batch.images) for batch in batches) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
