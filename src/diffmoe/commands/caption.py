"""`caption`: a sentence for each picture, as JSON and as a sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffmoe.commands.parsing import model_parser, show
from diffmoe.config import UserError, expanded
from diffmoe.config.settings import parse_given


def main(argv: Sequence[str]) -> int:
    """Write a caption for each picture."""
    parser = model_parser("caption", "Write a caption for each picture.", images="+")
    parser.add_argument("--seed", type=int, default=0, help="of --decoding sample (default: 0)")
    parser.add_argument(
        "--output_dir",
        default="visualizations/captions",
        type=expanded,
        help="for captions.json and captions.png",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of these names that are not its own")
    args, rest = parser.parse_known_args(argv)
    given = parse_given("generation", rest, prog="diffmoe caption")
    options = {name: getattr(args, name) for name in ("seed", "output_dir", "overwrite", "device")}
    rows = caption(args.images, args.checkpoint, given, **options)
    return show(rows, args.json, lambda rows: [print(f"{row['image']}: {row['caption']}") for row in rows])


def caption(
    images: Sequence[str],
    checkpoint: str,
    given: Mapping[str, Any],
    *,
    seed: int,
    output_dir: str,
    device: str,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """A caption for each picture file, also saved as `captions.json` and drawn as `captions.png` in `output_dir`.

    What an earlier call wrote is replaced; other files of these names only where told to `overwrite`. Its own are a
    `captions.json` in the layout and with the keys that it writes, and the `captions.png` beside such a one.

    `given`: fields of `GenerationConfig`; the others are as the recipe of the model's dataset has them.
    """
    from diffmoe.files import check_writable, write_atomically
    from diffmoe.inference import Predictor
    from diffmoe.tasks.captioning import FILE, SHEET, captions_as_text, check_captions_file, is_captions_file
    from diffmoe.visualization import captions, figures

    folder = Path(output_dir)
    texts, sheet = folder / FILE, folder / "captions.png"
    check_writable(folder)
    check_captions_file(texts, overwrite)
    if sheet.exists() and not overwrite and not is_captions_file(texts):
        raise UserError(f"{sheet} is not one that this program wrote: give another --output_dir or --overwrite")
    used = Predictor(checkpoint, device)
    pictures = used.read(images)
    written = [row["caption"] for row in used.caption(pictures, seed=seed, **given)]
    content = captions_as_text(list(images), written)
    write_atomically(texts, lambda unfinished: unfinished.write_text(content, encoding="utf-8"))
    figures.save(captions.caption_sheet(pictures[:SHEET], written[:SHEET]), sheet)
    return [{"image": path, "caption": text} for path, text in zip(images, written, strict=True)]
