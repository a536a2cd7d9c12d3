"""`predict`: the classes of pictures, and what a text beside them changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffmoe.commands.parsing import model_parser, print_predictions, show
from diffmoe.config import UserError

if TYPE_CHECKING:
    from diffmoe.inference import Row


def main(argv: Sequence[str]) -> int:
    """Classify pictures."""
    parser = model_parser("predict", "Classify pictures.", images="+")
    parser.add_argument("--top", type=int, default=5, help="classes to show for each picture (default: 5)")
    parser.add_argument("--text", help="what is said of the pictures, to be weighed with them")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UserError(f"top is {args.top}: it must be at least 1")
    return show(predict(args.images, args.checkpoint, args.top, args.device, args.text), args.json, print_predictions)


def predict(images: Sequence[str], checkpoint: str, top: int, device: str, text: str | None = None) -> list[Row]:
    """A row a picture: `predictions` where the model has classes, and what `Predictor.compare` says of `text`."""
    from diffmoe.inference import Predictor

    used = Predictor(checkpoint, device)
    pictures = used.read(images)
    rows: list[Row] = [{} for _ in images]
    if text is None and not used.has_classes:
        raise UserError(f"{checkpoint} has no classes: diffmoe caption writes captions; predict needs --text with it")
    found = [used.classify(pictures, top)] if used.has_classes else []
    found += [] if text is None else [used.compare(pictures, text, top)]
    for of_all in found:
        rows = [{**row, **more} for row, more in zip(rows, of_all, strict=True)]
    return [{**row, "image": path} for row, path in zip(rows, images, strict=True)]
