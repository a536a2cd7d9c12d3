"""`caption`: a sentence for each picture, as JSON and as a sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffmoe.commands.parsing import list_fields, model_parser, show
from diffmoe.config import GenerationConfig, UserError, expanded
from diffmoe.config.settings import parse_given

OUTPUT_DIR = "visualizations/captions"
SHEET_FILE = "captions.png"


def main(argv: Sequence[str]) -> int:
    """Write a caption for each picture."""
    parser = model_parser("caption", "Write a caption for each picture.", images="+")
    parser.add_argument("--seed", type=int, default=0, help="of --decoding sample (default: 0)")
    where = f"for captions.json and captions.png (default: {OUTPUT_DIR}, but with --json none are written)"
    parser.add_argument("--output_dir", type=expanded, help=where)
    parser.add_argument("--overwrite", action="store_true", help="replace files of these names that are not its own")
    parser.epilog = "What is not given of the following is as the recipe of the model's dataset has it."
    list_fields(parser, GenerationConfig)
    args, rest = parser.parse_known_args(argv)
    given = parse_given("generation", rest, prog="diffmoe caption")
    options = {name: getattr(args, name) for name in ("seed", "overwrite", "device")}
    folder = args.output_dir or (None if args.json else OUTPUT_DIR)
    rows = caption(args.images, args.checkpoint, given, output_dir=folder, **options)
    return show(rows, args.json, lambda rows: [print(f"{row['image']}: {row['caption']}") for row in rows])


def caption(
    images: Sequence[str],
    checkpoint: str,
    given: Mapping[str, Any],
    *,
    seed: int,
    output_dir: str | None,
    device: str,
    overwrite: bool = False,
) -> list[dict[str, str]]:
    """A caption for each picture file, saved as `captions.json` and drawn as `captions.png` in `output_dir`, if any.

    What an earlier call wrote is replaced; other files of these names only where told to `overwrite`. Its own are a
    `captions.json` in the layout and with the keys that it writes, and the `captions.png` beside such a one.

    `given`: fields of `GenerationConfig`; the others are as the recipe of the model's dataset has them.
    """
    from diffmoe.files import check_writable, write_atomically
    from diffmoe.inference import Predictor
    from diffmoe.tasks.captioning import FILE, SHEET, captions_as_text, check_captions_file, is_captions_file
    from diffmoe.visualization import captions, figures

    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        check_writable(folder)
        check_captions_file(folder / FILE, overwrite)
        if (folder / SHEET_FILE).exists() and not overwrite and not is_captions_file(folder / FILE):
            sheet = folder / SHEET_FILE
            raise UserError(f"{sheet} is not one that this program wrote: give another --output_dir or --overwrite")
    used = Predictor(checkpoint, device)
    pictures = used.read(images)
    written = [row["caption"] for row in used.caption(pictures, seed=seed, **given)]
    if folder is not None:
        content = captions_as_text(list(images), written)
        write_atomically(folder / FILE, lambda unfinished: unfinished.write_text(content, encoding="utf-8"))
        figures.save(captions.caption_sheet(pictures[:SHEET], written[:SHEET]), folder / SHEET_FILE)
    return [{"image": path, "caption": text} for path, text in zip(images, written, strict=True)]
