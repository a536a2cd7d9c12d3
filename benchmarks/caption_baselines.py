"""What a captioner must beat: `python benchmarks/caption_baselines.py [--json] [--dataset NAME --data_dir DIR]`.

Two baselines that learn nothing of pictures, on the test split: one constant caption (the training caption of the
commonest words), and the captions of the training picture nearest in pixels. For retrieval the latter compares words:
each picture stands for the captions of its nearest training picture, as bags of words.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import DataConfig
from diffmoe.data import CaptionDataset, LazyImages, load_captions
from diffmoe.evaluation import (
    caption_metrics,
    constant_caption,
    nearest_pictures,
    normalize_captions,
    retrieval_metrics,
    word_vectors,
)


def main() -> None:
    """Print a table, or with `--json` an object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", default="flickr8k")
    parser.add_argument("--data_dir", default="../shared/data")
    parser.add_argument("--img_size", type=int, default=32, help="pictures are compared at this size, shrunk to 8")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    data_dir = None if args.dataset == "shapes" else args.data_dir
    data = load_captions(DataConfig(dataset=args.dataset, data_dir=data_dir), img_size=args.img_size, in_channels=3)
    results = measure(data)
    if args.json:
        print(json.dumps(results))
        return
    print(f"constant caption: {results['constant_caption']!r}")
    names = list(results["nearest_pixels"])
    print(f"{'':16}{'constant':>10}{'nearest pixels':>16}")
    for name in names:
        constant = results["constant"].get(name)
        shown = f"{constant:10.3f}" if constant is not None else f"{'':10}"
        print(f"{name:16}{shown}{results['nearest_pixels'][name]:16.3f}")


def measure(data: CaptionDataset) -> dict[str, Any]:
    """Metrics of both baselines on the test split."""
    test, train = data.test, data.train
    references = [normalize_captions(texts) for texts in test.captions]
    constant = constant_caption(train.captions)
    nearest = nearest_pictures(in_memory(test.images), in_memory(train.images))
    borrowed = [normalize_captions(train.captions[row]) for row in nearest.tolist()]
    texts = [text for of_picture in references for text in of_picture]
    vocabulary = [text for of_picture in train.captions for text in normalize_captions(of_picture)]
    image_words = word_vectors([" ".join(of_picture) for of_picture in borrowed], vocabulary)
    image_of_text = torch.arange(len(references)).repeat_interleave(torch.tensor([len(r) for r in references]))
    found = retrieval_metrics(image_words, word_vectors(texts, vocabulary), image_of_text)
    return {
        "constant_caption": constant,
        "constant": caption_metrics([constant] * len(references), references),
        "nearest_pixels": caption_metrics([of_picture[0] for of_picture in borrowed], references) | found,
    }


def in_memory(images: Tensor | LazyImages) -> Tensor:
    """uint8 (N, C, H, W)."""
    return images.load(progress=True) if isinstance(images, LazyImages) else images


if __name__ == "__main__":
    main()
