"""`predict`: the classes of pictures, and what a text beside them changes."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.commands.parsing import log, model_parser, print_predictions, show
from diffmoe.config import UserError, expanded

if TYPE_CHECKING:
    from torch import Tensor

    from diffmoe.data.asked import Asked
    from diffmoe.inference import Predictor, Row

READERS = 2
"""Threads that decode pictures while the model looks at those before."""


def main(argv: Sequence[str]) -> int:
    """Classify pictures."""
    what = "picture files of any size and kind, folders of them, or patterns such as 'photos/**/*.jpg'"
    parser = model_parser("predict", "Classify pictures.", images="+", what=what)
    parser.add_argument("--top", type=int, default=5, help="classes to show for each picture (default: 5)")
    parser.add_argument("--text", help="what is said of the pictures, to be weighed with them")
    parser.add_argument(
        "--tta",
        choices=("none", "flip", "flip_shift"),
        default="none",
        help="average over each picture and its mirror, and with flip_shift over both shifted by a pixel too",
    )
    parser.add_argument("--threshold", type=float, help="probability under which a picture's class is called unsure")
    parser.add_argument("--csv", type=expanded, help="file for the answers, a line a picture")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    args = parser.parse(argv)
    if args.top < 1:
        raise UserError(f"top is {args.top}: it must be at least 1")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"threshold is {args.threshold}: it must be from 0 to 1")
    file = None if args.csv is None else Path(args.csv)
    if file is not None:
        _check_file(file, args.overwrite)
    options = {name: getattr(args, name) for name in ("text", "tta", "threshold")}
    rows = predict(args.images, args.checkpoint, args.top, args.device, **options)
    if file is None:
        return show(rows, args.json, print_predictions)
    write_csv(file, rows)
    return show(rows, args.json, lambda rows: print(_counted(rows, file)))


def predict(
    images: Sequence[str],
    checkpoint: str,
    top: int,
    device: str,
    text: str | None = None,
    tta: str = "none",
    threshold: float | None = None,
) -> list[Row]:
    """A row a picture: `predictions` where the model has classes, and what `Predictor.compare` says of `text`.

    With a `threshold` a row says whether its best class is less probable, `unsure`. `images` are files, folders and
    patterns. A picture that cannot be read is a mistake where it was named itself; where it was found, its row has the
    `error` instead, and a warning tells how many there are.
    """
    from diffmoe.data.asked import asked_pictures
    from diffmoe.inference import Predictor

    asked = asked_pictures(images)
    used = Predictor(checkpoint, device)
    if not used.has_classes:
        if text is None:
            raise UserError(
                f"{checkpoint} has no classes: diffmoe caption writes captions; predict needs --text with it"
            )
        if tta != "none":
            raise UserError(f"tta is {tta!r}: it averages the probabilities of classes, and {checkpoint} has none")
        if threshold is not None:
            raise UserError(f"threshold is {threshold}: it is of the probability of a class, and {checkpoint} has none")
    rows: list[Row] = []
    for part, pixels in _read(used, asked):
        answers = iter(_answers(used, pixels, top, text, tta, threshold) if pixels is not None else [])
        rows += [{"image": one.path, **({"error": why} if why else next(answers))} for one, why in part]
    if failed := [row["error"] for row in rows if "error" in row]:
        if len(failed) == len(rows):
            raise UserError(failed[0])
        log.warning("%d of %d pictures cannot be read: %s", len(failed), len(rows), failed[0])
    return rows


Part = list[tuple["Asked", str]]
"""Pictures, and why each cannot be read: empty where it can."""


def _read(used: Predictor, asked: Sequence[Asked]) -> Iterator[tuple[Part, Tensor | None]]:
    """A batch at a time the pictures, and of those that can be read the pixels, the next batch being read meanwhile."""
    import torch
    from tqdm import tqdm

    size = used.picture.evaluation_batch
    chunks = [asked[start : start + size] for start in range(0, len(asked), size)]

    def read(one: Asked) -> Tensor | UserError:
        try:
            return used.picture.read(one.path)
        except UserError as error:
            if one.by_name:
                raise
            return error

    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=len(asked), unit="picture", leave=False, disable=True if len(chunks) < 2 else None) as bar,
    ):
        ahead: list[Future[Tensor | UserError]] = [pool.submit(read, one) for one in chunks[0]]
        for number, chunk in enumerate(chunks):
            found = [future.result() for future in ahead]
            ahead = [pool.submit(read, one) for one in chunks[number + 1]] if number + 1 < len(chunks) else []
            pixels = [one for one in found if not isinstance(one, UserError)]
            why = [str(one) if isinstance(one, UserError) else "" for one in found]
            yield list(zip(chunk, why, strict=True)), torch.stack(pixels) if pixels else None
            bar.update(len(chunk))


def _answers(
    used: Predictor, pixels: Tensor, top: int, text: str | None, tta: str, threshold: float | None
) -> list[Row]:
    rows: list[Row] = [{} for _ in pixels]
    found = [used.classify(pixels, top, tta)] if used.has_classes else []
    found += [] if text is None else [used.compare(pixels, text, top)]
    for of_all in found:
        rows = [{**row, **more} for row, more in zip(rows, of_all, strict=True)]
    for row in rows:
        del row["image"]
        if threshold is not None:
            row["unsure"] = row["predictions"][0]["probability"] < threshold
    return rows


def _check_file(file: Path, overwrite: bool) -> None:
    from diffmoe.files import check_writable

    if file.is_dir():
        raise UserError(f"csv is {file}: it must be a file, not a folder")
    if file.exists() and not overwrite:
        raise UserError(f"{file} is there already: give --overwrite or another --csv")
    check_writable(file.parent)


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """A line a picture: `image`, `class`, `probability`, `class_2`, ..., and what else the rows hold."""
    from diffmoe.files import write_atomically

    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))

    def write(path: Path) -> None:
        # With a byte-order mark, without which a spreadsheet takes UTF-8 for something else.
        with path.open("w", newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
            writer = csv.DictWriter(opened, columns)
            writer.writeheader()
            writer.writerows(flat)

    write_atomically(file, write)


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("predictions", "with_text"):
            before = "" if name == "predictions" else "with_text_"
            for place, predicted in enumerate(value, 1):
                after = "" if place == 1 else f"_{place}"
                flat |= {f"{before}{key}{after}": predicted[key] for key in ("class", "probability")}
        else:
            flat[name] = " ".join(value) if isinstance(value, list) else value
    return flat


def _counted(rows: Sequence[Row], file: Path) -> str:
    """How many pictures are of each class, the most frequent first."""
    named = ["unreadable" if "error" in row else "unsure" if row.get("unsure") else _best(row) for row in rows]
    counts = ", ".join(f"{name} {count:,}" for name, count in Counter(named).most_common() if name)
    return f"{file}: {len(rows):,} pictures" + (f"; {counts}" if counts else "")


def _best(row: Row) -> str:
    return row["predictions"][0]["class"] if "predictions" in row else ""
