"""`retrieve`: the pictures of a gallery that a text asks for, or the texts that fit a picture, through an index."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.commands.parsing import model_parser, show
from diffmoe.config import DataConfig, UserError, dataset_name, expanded

if TYPE_CHECKING:
    from torch import Tensor

    from diffmoe.data.pictures import LazyImages
    from diffmoe.inference import Predictor
    from diffmoe.storage.index import Index


def main(argv: Sequence[str]) -> int:
    """Search."""
    parser = model_parser("retrieve", "Find pictures by a text, or texts by a picture.")
    parser.add_argument("gallery", type=expanded, help="a folder of pictures, or a dataset")
    parser.add_argument("--text", help="asks for pictures of the gallery")
    parser.add_argument("--image", type=expanded, help="a picture file; asks for texts")
    parser.add_argument("--sentences", type=expanded, help="file of texts, one a line; default: the gallery's captions")
    parser.add_argument("--data_dir", help="folder that holds the dataset")
    parser.add_argument("--split", default="test", help="split of a dataset (default: test)")
    parser.add_argument("--index", type=expanded, help="file that keeps the embeddings; default: in output_dir")
    parser.add_argument("--overwrite", action="store_true", help="make the index again where it does not fit")
    parser.add_argument("--top", type=int, default=8, help="how many to find (default: 8)")
    parser.add_argument("--output_dir", default="visualizations", type=expanded, help="for the index and the picture")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    if args["top"] < 1:
        raise UserError(f"top is {args['top']}: it must be at least 1")
    return show(retrieve(args.pop("checkpoint"), args.pop("gallery"), **args), as_json, _print_found)


def _print_found(found: Mapping[str, Any]) -> None:
    for row in found["results"]:
        print(f"  {row['similarity']:6.3f}  {row['item']}")
    print(f"picture: {found['picture']}   index: {found['index']}")


@dataclass(frozen=True)
class Gallery:
    """Pictures to search, and the captions that they come with."""

    names: tuple[str, ...]
    images: Tensor | LazyImages
    """uint8 (N, C, H, W)."""
    texts: tuple[str, ...]
    key: str
    """Changes with the pictures."""


def retrieve(
    checkpoint: str,
    gallery: str,
    *,
    text: str | None = None,
    image: str | None = None,
    sentences: str | None = None,
    data_dir: str | None = None,
    split: str = "test",
    index: str | None = None,
    overwrite: bool = False,
    top: int = 8,
    output_dir: str = "visualizations",
    device: str = "auto",
) -> dict[str, Any]:
    """Search, and draw what was found: `{query, index, picture, results: [{item, similarity}]}`.

    The arguments are the flags of `diffmoe retrieve`; the index is `<output_dir>/<gallery>/<kind>.safetensors` unless
    named. Raises `UserError`.
    """
    if (text is None) == (image is None):
        raise UserError("retrieve needs either --text, which asks for pictures, or --image, which asks for texts")
    if split not in ("train", "validation", "test"):
        raise UserError(f"split is {split!r}: it must be train, validation or test")
    from diffmoe.files import check_outside_data, check_writable
    from diffmoe.inference import Predictor
    from diffmoe.visualization import captions, figures

    folder = Path(output_dir) / dataset_name(gallery)
    check_writable(folder)
    check_outside_data(folder, DataConfig(dataset=gallery, data_dir=data_dir), "output_dir", "visualizations")
    used = Predictor(checkpoint, device)
    query = used.embed_texts([text]) if text is not None else used.embed_images(str(image))
    found = _open_gallery(used, gallery, data_dir, split)
    texts = _texts(found, sentences) if text is None else None
    path = Path(index) if index else folder / f"{'pictures' if texts is None else 'texts'}.safetensors"
    stored = _open_index(path, used, found, texts, overwrite)
    scores, rows = (tensor[0] for tensor in stored.search(query, top))
    items = [stored.items[row] for row in rows.tolist()]
    if text is not None:
        figure = captions.retrieval_grid(text, found.images[rows], scores)
    else:
        figure = captions.ranked_texts(used.read(str(image))[0], items, scores)
    picture = figures.save(figure, folder / "retrieved.png")
    results = [{"item": item, "similarity": score} for item, score in zip(items, scores.tolist(), strict=True)]
    return {"query": text or image, "index": str(path), "picture": str(picture), "results": results}


def _open_gallery(used: Predictor, gallery: str, data_dir: str | None, split: str) -> Gallery:
    import torch

    from diffmoe.data.folders import FilePictures, picture_files
    from diffmoe.data.loading import load_dataset
    from diffmoe.data.pictures import LazyImages
    from diffmoe.storage.index import gallery_fingerprint

    folder = Path(gallery)
    if data_dir is None and folder.is_dir() and (names := picture_files(folder)) and not (folder / "train").is_dir():
        files = FilePictures(folder, names)
        paths = tuple(str(folder / name) for name in names)
        images = LazyImages.of(files, used.picture)
        return Gallery(paths, images, (), gallery_fingerprint(paths, [Path(p) for p in paths]))
    # Split as for training: the model has not seen what is searched, unless it is told to look there.
    data = load_dataset(used.info.split_as_trained(DataConfig(dataset=gallery, data_dir=data_dir)), used.picture)
    searched = getattr(data, split)
    images = searched.images
    names = tuple(f"{dataset_name(gallery)} {split} {row}" for row in range(len(images)))
    sample = images[torch.arange(0, len(images), max(1, len(images) // 50))]
    content = hashlib.sha256(sample.numpy().tobytes()).hexdigest()
    return Gallery(names, images, searched.texts, gallery_fingerprint([content, *names]))


def _texts(gallery: Gallery, sentences: str | None) -> tuple[str, ...]:
    if sentences is None:
        if not gallery.texts:
            raise UserError("image asks for texts, and this gallery has no captions: give --sentences FILE, one a line")
        return gallery.texts
    from diffmoe.data.text_files import read_lines

    texts = tuple(line.strip() for _, line in read_lines(Path(sentences)))
    if not texts:
        raise UserError(f"{sentences} is empty: it must have a sentence on each line")
    return texts


def _open_index(path: Path, used: Predictor, gallery: Gallery, texts: tuple[str, ...] | None, overwrite: bool) -> Index:
    """Of the gallery's pictures, or of `texts`: the stored one, which must be of this model and them, or a new one."""
    from diffmoe.storage.index import Index, gallery_fingerprint, model_fingerprint

    model, key = model_fingerprint(used.model), gallery.key if texts is None else gallery_fingerprint(texts)
    if path.exists() and not overwrite:
        stored = Index.load(path)
        stored.check(path, model=model, gallery=key)
        return stored
    if texts is None:
        made = Index(used.embed_images(gallery.images), gallery.names, "pictures", model, key)
    else:
        made = Index(used.embed_texts(texts), texts, "texts", model, key)
    made.save(path)
    return made
