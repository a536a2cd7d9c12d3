"""What the page answers: plain values and figures, from a model file's name and a picture's path."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffmoe.app.models import Models
from diffmoe.app.seen import enlarged
from diffmoe.app.uploads import read_upload, thumbnail
from diffmoe.config import UserError
from diffmoe.data.folders import FilePictures, picture_files
from diffmoe.data.pictures import LazyImages
from diffmoe.inference import Predictor
from diffmoe.storage.index import Index, gallery_fingerprint, model_fingerprint
from diffmoe.visualization.attention import attention_maps
from diffmoe.visualization.experts import routing_map
from diffmoe.visualization.language import say

FOUND = 8
"""Pictures that a search shows."""
MOST_LABELS = 1000
"""Each is a few sentences to read, and meanwhile others wait."""


@dataclass(frozen=True)
class Answers:
    """The answers to what can be asked on the page. All raise `UserError`; pictures are paths, None where none is."""

    models: Models
    gallery: Path | None
    """The only folder that may be searched, resolved."""
    uploads: Path
    """The only folder whose files are opened as the pictures that are asked about, resolved."""

    def predict(self, picture: str | None, model: str | None) -> dict[str, float]:
        """The probability of each class."""
        used, pixels = self._read(picture, model)
        if not used.has_classes:
            raise UserError(say("This model has no classes: it writes captions."))
        return dict(zip(used.info.class_names, used.probabilities(pixels[None])[0].tolist(), strict=True))

    def zero_shot(self, picture: str | None, labels: str, model: str | None) -> dict[str, float]:
        """The probability of each of the labels, which stand on lines of their own or between commas."""
        names = list(dict.fromkeys(name.strip() for name in labels.replace(",", "\n").splitlines() if name.strip()))
        if len(names) < 2:
            raise UserError(say("Give at least 2 different labels, each on a line of its own or between commas."))
        if len(names) > MOST_LABELS:
            raise UserError(say("Give at most {limit} labels.", limit=MOST_LABELS))
        used, pixels = self._read(picture, model)
        _check_reads_texts(used)
        probabilities = used.label_probabilities(pixels[None], names)[0]
        return dict(zip(names, probabilities.tolist(), strict=True))

    def caption(self, picture: str | None, model: str | None) -> str:
        """A sentence for the picture, by beam search."""
        used, pixels = self._read(picture, model)
        if used.has_classes:
            raise UserError(say("This model tells classes apart: captions need one that was trained on captions."))
        return used.caption(pixels[None])[0]["caption"]

    def retrieve(
        self, text: str, picture: str | None, folder: str | None, model: str | None
    ) -> list[tuple[Image.Image, str]]:
        """The pictures of a folder in the gallery that fit the text best, or the picture where there is no text.

        Each comes with its name in the gallery and its cosine similarity.
        """
        root, names = self._listed(folder or ".")
        used = self.models.open(model)
        if text.strip():
            _check_reads_texts(used)
            query = used.embed_texts([text])
        else:
            query = used.embed_images(self._pixels(picture, used)[None])
        index = _embed(used, root, names, gallery_fingerprint(names, [root / name for name in names]))
        scores, rows = (found[0].tolist() for found in index.search(query, FOUND))
        return [
            (thumbnail(root / names[row]), f"{names[row]}  {score:.3f}")
            for row, score in zip(rows, scores, strict=True)
        ]

    def folders(self) -> list[str]:
        """The gallery's folders, as paths from it."""
        if self.gallery is None:
            return []
        inside = sorted(path for path in self.gallery.rglob("*") if path.is_dir() and not path.is_symlink())
        return [".", *(path.relative_to(self.gallery).as_posix() for path in inside)]

    def routing(self, picture: str | None, block: int, model: str | None) -> Figure:
        """Which expert takes which patch: in one image block, counted from 1, or in all of them (0)."""
        used, pixels = self._read(picture, model)
        blocks = used.routing(pixels[None])
        if not blocks:
            raise UserError(say("This model is dense: it has no experts, so there is no routing to show."))
        _check_number(say("Block"), block, len(blocks))
        return routing_map(pixels, blocks, None if block == 0 else block - 1)

    def attention(self, picture: str | None, patch: int, model: str | None) -> Figure:
        """Where a patch looks, counted from 1 in reading order, or all patches on average (0)."""
        used, pixels = self._read(picture, model)
        _check_number(say("Patch"), patch, used.model.config.num_patches)
        return attention_maps(pixels, used.attention(pixels[None]), None if patch == 0 else patch - 1)

    def seen(self, picture: str | None, patch: int, model: str | None) -> Image.Image:
        """The picture as the model sees it, with the patch framed."""
        used, pixels = self._read(picture, model)
        return enlarged(pixels, used.model.config, patch)

    def _read(self, picture: str | None, model: str | None) -> tuple[Predictor, Tensor]:
        used = self.models.open(model)
        return used, self._pixels(picture, used)

    def _pixels(self, picture: str | None, used: Predictor) -> Tensor:
        return read_upload(picture, self.uploads, used.picture)

    def _listed(self, folder: str) -> tuple[Path, tuple[str, ...]]:
        """A folder of the gallery, and the pictures in it and its folders; links that leave the gallery are none."""
        if self.gallery is None:
            raise UserError(say("There is no gallery: start the page with --gallery DIR, a folder of pictures."))
        if folder not in self.folders():  # by name: nothing that a stranger says is looked for on the disk
            raise UserError(
                say("{folder} is no folder of the gallery: only its folders may be searched.", folder=folder)
            )
        root, gallery = self.gallery / folder, self.gallery
        files = ((Path(name).as_posix(), (root / name).resolve()) for name in picture_files(root, False))
        names = tuple(name for name, file in files if file.is_relative_to(gallery) and file.is_file())
        if not names:
            raise UserError(say("The folder {folder} of the gallery has no pictures.", folder=folder))
        return root, names


def _check_reads_texts(used: Predictor) -> None:
    if not used.reads_texts:
        raise UserError(say("This model was trained without texts: it cannot compare a picture with words."))


def _check_number(what: str, number: int, count: int) -> None:
    if not 0 <= number <= count:
        raise UserError(
            say("{what} is {number}: it must be from 0 (all) to {count}.", what=what, number=number, count=count)
        )


@lru_cache(maxsize=4)
def _embed(used: Predictor, root: Path, names: tuple[str, ...], key: str) -> Index:
    """The pictures of a folder, embedded; `key` changes with them."""
    pictures = LazyImages.of(FilePictures(root, names), used.picture)
    return Index(used.embed_images(pictures), names, "pictures", model_fingerprint(used.model), key)
