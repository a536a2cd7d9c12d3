"""Latency of a classifier, and captions: `python benchmarks/inference.py [--generation] [--json]`.

One picture (and more: `--batch_size 1 8 64`) through the presets' classifiers over their dense presets, as `predict`
does it: the classes' descriptions are read once, before. `--generation`: captions of full length with and without the
key-value cache, of one picture at a time and of many, by the captioners of Flickr8k's recipe.

Shapes: B pictures, C channels.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from classifiers import batch_source, classifier, preset_config
from tables import Row, Tables, comparison, show, slowdown
from timing import Contender, Times, add_timing_flags, autocast, float32_products, parse, race
from torch import Tensor

from diffmoe.config import END_ID, ModelConfig
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier

GOALS = {"small": 1.5}
"""Preset -> latency of one picture over the dense preset's, at most."""
CAPTION_GOALS = {"no cache": 3.0, "one by one": 10.0}
"""Contender -> time over that of many captions at once with the cache, at least."""
OUTPUT_TOKENS = 7218
"""That a caption can be written with: as many as occur in Flickr8k's."""


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or with `--json` an object."""
    args = parse_args(argv)
    tables: Tables = {
        "Classification": [
            row
            for preset in args.presets
            for batch_size in args.batch_size
            for mode in args.modes
            for row in compare(preset, batch_size, mode, args)
        ]
    }
    if args.generation:
        tables["Captions"] = [row for preset in args.presets for row in compare_generation(preset, args)]
    show("inference", args, tables, notes(args))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=("tiny", "small", "base"))
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dataset", default="fashion_mnist", help="whose pictures' size")
    parser.add_argument("--generation", action="store_true", help="also: captions")
    parser.add_argument("--caption_len", type=int, default=32, help="tokens of a caption, start and end included")
    parser.add_argument("--caption_dataset", default="flickr8k", help="whose recipe's captioners")
    parser.add_argument("--generation_batch", type=int, default=64, help="pictures captioned together")
    parser.add_argument("--alone", type=int, default=8, help="pictures of them that are also captioned one by one")
    parser.add_argument("--generation_rounds", type=int, default=5)
    add_timing_flags(parser, rounds=100, steps=1, modes=("float32", "onednn"))
    return parse(parser, argv)


def compare(preset: str, batch_size: int, mode: str, args: argparse.Namespace) -> list[Row]:
    """One race, a preset and its dense variant."""
    config = preset_config(preset, args.dataset)
    contenders: dict[str, Contender] = {
        name: Prediction(classifier(dataclasses.replace(config, dense=dense), args.seed), mode, args.device)
        for name, dense in (("MoE", False), ("dense", True))
    }
    source = batch_source(config, batch_size, args.device, args.seed)
    times = race(contenders, lambda: source()[0], args)
    promised = batch_size == 1 and args.device == "cpu"
    goals = {"MoE": GOALS.get(preset) if promised else None}
    setting = {"preset": preset, "batch_size": batch_size, "mode": mode}
    return [
        {**setting, **comparison(times, name, "dense", at_most=goals.get(name)), "p90_ms": times.p90_ms(name)}
        for name in contenders
    ]


class Prediction:
    """A classifier on new pictures, its classes read before, as a contender."""

    def __init__(self, model: ImageClassifier, mode: str, device: str) -> None:
        self.model, self.mode, self.device = model.to(device).eval(), mode, device
        with torch.inference_mode():
            self.descriptions = self.model.class_features()

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, size, size) -> logits (B, classes)."""
        with torch.inference_mode(), float32_products(self.mode), autocast(self.mode, self.device):
            return self.model.classify(images, classes=self.descriptions).logits


def compare_generation(preset: str, args: argparse.Namespace) -> list[Row]:
    """One race: many captions with the cache, without it, and one by one."""
    config = preset_config(preset, args.caption_dataset, max_text_len=args.caption_len)
    model = captioner(config, args)
    pictures, alone = args.generation_batch, min(args.alone, args.generation_batch)
    source = batch_source(config, pictures, args.device, args.seed)
    contenders: dict[str, Contender] = {
        "cache": Generation(model, args),
        "no cache": Generation(model, args, use_cache=False),
        "one by one": Generation(model, args, alone=alone),
    }
    rounds = argparse.Namespace(**{**vars(args), "rounds": args.generation_rounds})
    seconds = race(contenders, lambda: source()[0], rounds).seconds
    times = Times({**seconds, "one by one": [pictures / alone * taken for taken in seconds["one by one"]]})
    setting = {"preset": preset, "pictures": pictures, "mode": args.modes[-1]}
    promised = args.device == "cpu" and pictures >= 64
    return [
        {
            **setting,
            **slowdown(times, name, "cache", at_least=CAPTION_GOALS.get(name) if promised else None),
            "captions_per_second": 1000 * pictures / times.ms(name),
        }
        for name in contenders
    ]


def captioner(config: ModelConfig, args: argparse.Namespace) -> Captioner:
    """A fresh one: of untrained weights, but every caption is written to its full length."""
    torch.manual_seed(args.seed)
    return Captioner(config, torch.arange(END_ID + 1 - OUTPUT_TOKENS, END_ID + 1)).to(args.device).eval()


class Generation:
    """Greedy captions of full length for new pictures, as a contender; with `alone`, of so many, one by one."""

    def __init__(
        self, model: Captioner, args: argparse.Namespace, use_cache: bool = True, alone: int | None = None
    ) -> None:
        self.model, self.mode, self.device = model, args.modes[-1], args.device
        self.length, self.use_cache, self.alone = args.caption_len, use_cache, alone

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(B, C, size, size) -> captions (B, length), or `alone` times (1, length)."""
        batches = [images] if self.alone is None else images[: self.alone].split(1)
        with float32_products(self.mode), autocast(self.mode, self.device):
            return [self._write(batch) for batch in batches]

    def _write(self, images: Tensor) -> Tensor:
        return self.model.generate(images, decoding="greedy", min_caption_len=self.length - 2, use_cache=self.use_cache)


def notes(args: argparse.Namespace) -> list[str]:
    """What the tables leave unsaid."""
    said = [
        f"Classification: new pictures of {args.dataset}'s size at every step, by turns with the dense preset; "
        "ms is the median, p90 what nine tenths stay under."
    ]
    if args.generation:
        said.append(
            f"Captions: greedy, {args.caption_len} tokens each, {OUTPUT_TOKENS:,} tokens to choose from, untrained "
            f"weights, the models of {args.caption_dataset}'s recipe; the time includes reading the pictures. one by "
            f"one: {min(args.alone, args.generation_batch)} of the pictures, each alone, with the cache, and the time "
            "that all of them would take."
        )
    return said


if __name__ == "__main__":
    main()
