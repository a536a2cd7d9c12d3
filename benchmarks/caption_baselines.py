"""What a captioner must beat: `python benchmarks/caption_baselines.py [--captions FILE] [--json] [--dataset NAME]`.

Two baselines that learn nothing of pictures, on the test split: one constant caption (the training caption of the
commonest words), and the captions of the training picture nearest in pixels. For retrieval the latter compares words:
each picture stands for the captions of its nearest training picture, as bags of words.

With the captions.json that testing a captioner leaves, its captions are scored beside them, and each metric gets
the margin over the better baseline with its standard error over pictures, by the jackknife that leaves out a tenth of
them at a time (Efron & Tibshirani 1993, section 11.5, for groups).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import DataConfig
from diffmoe.data.loading import Dataset, load_dataset
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.evaluation.captions import caption_metrics, constant_caption, nearest_pictures, normalize_captions
from diffmoe.evaluation.retrieval import retrieval_metrics, word_vectors


def main() -> None:
    """Print a table, or with `--json` an object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", default="flickr8k")
    parser.add_argument("--data_dir", default="../shared/data")
    parser.add_argument("--img_size", type=int, default=32, help="pictures are compared at this size, shrunk to 8")
    parser.add_argument("--captions", type=Path, help="captions.json of a captioner's test, to compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.captions and not args.captions.is_file():
        parser.error(f"captions is {str(args.captions)!r}: it must be the captions.json of a test")
    data_dir = None if args.dataset == "shapes" else args.data_dir
    data = load_dataset(DataConfig(dataset=args.dataset, data_dir=data_dir), PictureSpec(args.img_size, 3))
    results = measure(data, args.captions)
    print(json.dumps(results) if args.json else table(results))


def table(results: dict[str, Any]) -> str:
    """As lines of text."""
    columns = [
        name for name in ("constant", "nearest_pixels", "captioner", "margin", "standard_error") if name in results
    ]
    lines = [f"constant caption: {results['constant_caption']!r}", f"{'':16}" + "".join(f"{c:>16}" for c in columns)]
    for name in results["nearest_pixels"]:
        values = (results[column].get(name) for column in columns)
        lines.append(f"{name:16}" + "".join(f"{'' if v is None else format(v, '.3f'):>16}" for v in values))
    return "\n".join(lines)


def measure(data: Dataset, captions: Path | None = None) -> dict[str, Any]:
    """Metrics of both baselines on the test split, and of the captions in a file."""
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
    baselines = [[constant] * len(references), [of_picture[0] for of_picture in borrowed]]
    results = {
        "constant_caption": constant,
        "constant": caption_metrics(baselines[0], references),
        "nearest_pixels": caption_metrics(baselines[1], references) | found,
    }
    if captions is not None:
        rows = json.loads(captions.read_text(encoding="utf-8"))
        written = normalize_captions(row["caption"] for row in rows)
        results["captioner"] = caption_metrics(written, references)
        results |= margins(written, baselines, references)
    return results


def margins(
    written: Sequence[str], baselines: Sequence[Sequence[str]], references: Sequence[Sequence[str]], groups: int = 10
) -> dict[str, dict[str, float]]:
    """By how much each metric of `written` is over the best of the baselines', and the standard error of that.

    N candidates each, N lists of references. Group g is pictures g, g + groups, and so on.
    """

    def margin(rows: Sequence[int]) -> dict[str, float]:
        wanted = [references[row] for row in rows]
        ours, *theirs = (caption_metrics([texts[row] for row in rows], wanted) for texts in (written, *baselines))
        return {name: score - max(other[name] for other in theirs) for name, score in ours.items()}

    all_rows = range(len(references))
    without = [margin([row for row in all_rows if row % groups != group]) for group in range(groups)]
    whole = margin(all_rows)
    errors = {}
    for name in whole:
        values = torch.tensor([each[name] for each in without], dtype=torch.float64)
        errors[name] = float((values.var(correction=0) * (groups - 1)).sqrt())
    return {"margin": whole, "standard_error": errors}


def in_memory(images: Tensor | LazyImages) -> Tensor:
    """uint8 (N, C, H, W)."""
    return images.load(progress=True) if isinstance(images, LazyImages) else images


if __name__ == "__main__":
    main()
