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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.config import DataConfig
from diffmoe.data.loading import Dataset, load_dataset
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.evaluation.captions import caption_metrics, normalize_captions
from diffmoe.evaluation.retrieval import retrieval_metrics


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


def constant_caption(captions: Sequence[Sequence[str]], max_words: int = 10) -> str:
    """The baseline that sees no picture: one caption of `max_words` words or fewer for all pictures.

    Of all training captions, the one whose words are the most common on average, each word of it counted once.
    """
    texts = [text.split() for of_picture in captions for text in normalize_captions(of_picture)]
    frequency = Counter(word for words in texts for word in set(words))

    def commonness(words: Sequence[str]) -> float:
        return sum(frequency[word] for word in set(words)) / len(words)

    candidates = [words for words in texts if max_words // 2 < len(words) <= max_words] or texts
    return " ".join(max(candidates, key=commonness))


def nearest_pictures(images: Tensor, gallery: Tensor, size: int = 8, chunk: int = 256) -> Tensor:
    """The baseline that compares pixels: for each picture (I, C, H, W) the nearest of a gallery (G, C, H, W), (I,).

    By the Euclidean distance of the pictures shrunk to `size` x `size`, their mean taken away and of unit norm.
    """
    vectors = []
    for pictures in (images, gallery):
        small = torch.cat(
            [F.interpolate(part.float(), size=size, mode="area") for part in pictures.split(chunk)]
        ).flatten(1)
        vectors.append(F.normalize(small - small.mean(1, keepdim=True), dim=1))
    return (vectors[0] @ vectors[1].T).argmax(1)


def word_vectors(texts: Sequence[str], vocabulary_of: Sequence[str]) -> Tensor:
    """Bags of words, (M, V) float32 of unit norm, over the words of `vocabulary_of`: a baseline of what is alike."""
    place = {word: n for n, word in enumerate(sorted({word for text in vocabulary_of for word in text.split()}))}
    vectors = torch.zeros(len(texts), len(place))
    for row, text in enumerate(texts):
        for word in text.split():
            if word in place:
                vectors[row, place[word]] += 1
    return F.normalize(vectors, dim=-1)


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
